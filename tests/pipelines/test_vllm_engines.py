"""What engines are told and how they start, above all on a GPU, for which fakes stand here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import continued
from tiny_models import prompts_of
from vllm_models import fake_python, tiny_for_vllm

from splitwiser_lab import ModeError, VllmPipeline, Workload
from splitwiser_lab.pipelines.source import Facts
from splitwiser_lab.pipelines.vllm import team
from splitwiser_lab.pipelines.vllm.arguments import engine_arguments
from splitwiser_lab.pipelines.vllm.memory import Work, kv_budget
from splitwiser_lab.pipelines.vllm.placement import VllmPlacement
from splitwiser_lab.pipelines.vllm.settings import EngineSettings
from splitwiser_lab.pipelines.vllm.source import VllmModel
from splitwiser_lab.shared_memory import DeviceHandle, allocate

MODEL = VllmModel("m", Path("/models/m"), None, Facts(100, 4096, ()), "bfloat16", False, 2 * 2**30, 36864)
WORK = Work(1024, 1152, 128, 128)
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 140 GiB, to those who ask what there is."""
    properties = SimpleNamespace(total_memory=140 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(team, "_first", {})


# -- what an engine is told


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux keeps a process to some cores")
def test_an_engine_computes_with_one_thread_for_each_of_its_cores() -> None:
    """Chosen before torch is loaded; with more, they wait for each other on the core that they share."""
    core = min(os.sched_getaffinity(0))
    program = (
        f"import os, run_engine as r; r._compute_on([{core}])\n"
        "import torch; print(torch.get_num_threads(), os.sched_getaffinity(0))\n"
        f"r._compute_on([{core}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(team.__file__).parent / "engine_side")}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == f"1 {{{core}}}", done.stderr
    assert "torch was loaded before" in done.stderr.splitlines()[-1]


def told(
    placement: VllmPlacement, settings: EngineSettings | None = None, device: str = "cuda:0"
) -> list[dict[str, Any]]:
    budget = kv_budget(placement, MODEL, device, WORK, 130 * GIB, 100 * GIB)
    given = settings or EngineSettings()
    return [
        engine_arguments(MODEL, placement, role, WORK, given, torch.device(device), kv_bytes)
        for role, kv_bytes in zip(placement.roles, budget.kv_bytes, strict=True)
    ]


def test_an_engine_on_a_gpu_captures_its_decode_steps_and_no_more(gpu: None) -> None:
    (one,) = told(VllmPlacement.of("sequential"))
    assert (one["enforce_eager"], one["max_num_seqs"], one["max_cudagraph_capture_size"]) == (False, 128, 128)
    assert not one["enable_chunked_prefill"] and one["max_num_batched_tokens"] == 8192
    prefill, decode = told(VllmPlacement.of("split", 2))
    assert (prefill["max_cudagraph_capture_size"], decode["max_cudagraph_capture_size"]) == (128, 128)
    assert prefill["max_num_batched_tokens"] == decode["max_num_batched_tokens"] == 8192, "eight prompts in a step"
    assert prefill["num_gpu_blocks_override"] == 2 * 8 * 1152 // 16 + 16, "of which the next eight have their blocks"
    (chunks,) = told(VllmPlacement.of("sequential", chunk_tokens=512))
    assert chunks["max_num_batched_tokens"] == 512 and chunks["max_cudagraph_capture_size"] == 512
    (longer,) = told(VllmPlacement.of("sequential", chunk_tokens=2048))
    assert longer["max_num_batched_tokens"] == 2048 and longer["max_cudagraph_capture_size"] == 512


def test_a_prefill_engine_on_a_cpu_takes_one_prompt_in_a_step() -> None:
    prefill, decode = told(VllmPlacement.of("split", 2), device="cpu")
    assert prefill["max_num_batched_tokens"] == decode["max_num_batched_tokens"] == WORK.total
    assert prefill["kv_cache_memory_bytes"] == (2 * WORK.total + 256) * MODEL.kv_token_bytes
    (one,) = told(VllmPlacement.of("sequential"), device="cpu")
    assert one["max_num_batched_tokens"] == 2048


def test_what_vllm_compiles_does_not_hang_on_the_size_of_its_cache_or_the_folder(gpu: None) -> None:
    (one,), many = told(VllmPlacement.of("sequential")), told(VllmPlacement.of("replicas", 4))
    blocks = [each["num_gpu_blocks_override"] for each in (one, *many)]
    assert blocks[0] == 128 * 1152 // 16 + 16 and blocks[1:] == [32 * 1152 // 16 + 16] * 4
    assert {each["kv_cache_memory_bytes"] for each in (one, *many)} == {(1152 + 256) * MODEL.kv_token_bytes}
    assert one["model"] == "m", "which is found from the folder around it"


def test_an_older_regime(gpu: None) -> None:
    for placement in (VllmPlacement.of("sequential"), VllmPlacement.of("replicas", 2), VllmPlacement.of("split", 2)):
        for each in told(placement, EngineSettings(eager=True, max_batch=8)):
            assert each["enforce_eager"] and each["max_num_seqs"] == 8 and "max_cudagraph_capture_size" not in each
    (one,) = told(VllmPlacement.of("sequential"), EngineSettings(max_batch=1))
    assert (one["max_num_seqs"], one["max_cudagraph_capture_size"]) == (1, 1)
    for most, captured in ((3, 4), (5, 8), (8, 8), (20, 24)):
        (one,) = told(VllmPlacement.of("sequential"), EngineSettings(max_batch=most))
        assert one["max_cudagraph_capture_size"] == captured, "a size that vLLM captures"
    (small,) = told(VllmPlacement.of("sequential"), device="cpu")
    assert small["enforce_eager"] and "num_gpu_blocks_override" not in small


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "8"])
def test_a_batch_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ModeError, match=r"max_batch=.*1 or more"):
        EngineSettings(max_batch=wrong)


def test_slots_of_the_shared_connector_lie_on_the_gpu() -> None:
    shared, example = (VllmPlacement.of("split", 2, connector=name) for name in ("shared", "example"))
    free, host = 140 * GIB, 4 * GIB
    on_gpu = kv_budget(shared, MODEL, "cuda:0", WORK, free, host)
    in_files = kv_budget(example, MODEL, "cuda:0", WORK, free, host)
    assert on_gpu.slots > in_files.slots, "there is less room on the host"
    assert f"{on_gpu.slots * on_gpu.slot_bytes / GIB:.2f} GiB hand-off" in on_gpu.sum
    assert "0.00 GiB hand-off" in in_files.sum


# -- how engines start on a GPU


def test_engines_of_a_known_kind_start_side_by_side(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_process_left: None
) -> None:
    tiny_for_vllm(tmp_path / "tiny")
    events: list[str] = []
    for what in ("ask", "hear"):
        true = getattr(team.EngineProcess, what)

        def noted(self, *given: Any, what: str = what, true: Any = true) -> Any:
            events.append(f"{what} {self._who.removeprefix('vLLM')[3:]}")
            return true(self, *given)

        monkeypatch.setattr(team.EngineProcess, what, noted)
    buffer = allocate(1 << 20, "cpu")
    monkeypatch.setattr(buffer, "export", lambda: DeviceHandle(b"\x01" * 64, 512))
    monkeypatch.setattr(team, "allocate", lambda nbytes, device: buffer)
    monkeypatch.setattr(team, "settled_free_bytes", lambda device: 100 * GIB)
    monkeypatch.setattr(team, "index_of", lambda device: 0)
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(team.Team, "_transfer", _spied(team.Team._transfer, sent))
    with VllmPipeline.from_pretrained(tmp_path / "tiny", "cpu", vllm_python=fake_python(tmp_path)) as made:
        made.device = "cuda:0"
        work = Workload.closed(prompts_of(30, 20), output_tokens=4)
        made.set_mode("replicas", 3)
        made.start(work)
        assert _asked(events) == ["engine 0", "-", "engine 1", "engine 2", "-", "-"], "the first compiles"
        assert not made.generate(prompts_of(5), 2).spawn_s
        events.clear()
        made.set_mode("split", connector="shared")
        made.start(work)
        assert _asked(events) == ["prefill", "-", "decode", "-"], "another kind: engines with a connector"
        events.clear()
        made.set_mode("replicas", 2)
        made.start(work)
        assert _asked(events) == ["engine 0", "engine 1", "-", "-"], "known from before"
        assert made.generate(prompts_of(9), 4, ignore_eos=True).tokens == [continued(prompts_of(9)[0], 4)]
        events.clear()
        with made.beside("sequential", chunk_tokens=32) as chunks, made.beside("replicas", 2) as more:
            for each in (chunks, more):
                each.launch(work)
            assert _asked(events) == ["engine 0", "engine 0", "engine 1"], "a new kind compiles beside a known one"
            with made.beside("replicas", 3, chunk_tokens=32) as later:
                later.launch(work)
                assert _asked(events)[3:] == [], "it waits for nobody, and leaves its engines for later"
                later.launch(work)
                assert _asked(events)[3:] == ["-", *(f"engine {number}" for number in range(3))]
                assert later.generate(prompts_of(9), 4, ignore_eos=True).tokens == [continued(prompts_of(9)[0], 4)]
            assert more.generate(prompts_of(9), 4, ignore_eos=True).tokens == [continued(prompts_of(9)[0], 4)]
        events.clear()
        with made.beside("sequential", chunk_tokens=64) as first:
            first.launch(work)
        with made.beside("sequential", chunk_tokens=64) as second:
            second.launch(work)
            assert _asked(events) == ["engine 0", "engine 0"], "one that was ended before it compiled is no first"
    memory = next(each["kv_connector_extra_config"]["memory"] for each in sent if each)
    assert memory == {"handle": "01" * 64, "offset": 512, "nbytes": 1 << 20} and json.dumps(memory)


def _spied(true: Any, sent: list[dict[str, Any]]) -> Any:
    def spy(self: Any, role: Any) -> Any:
        sent.append(true(self, role))
        return sent[-1]

    return spy


def _asked(events: list[str]) -> list[str]:
    """Names in the order in which engines were told their settings; `-` where one was waited for until it was ready."""
    order, heard = [], dict[str, int]()
    for what, _, who in (event.partition(" ") for event in events):
        if what == "ask":
            order.append(who)
        else:
            heard[who] = heard.get(who, 0) + 1
            if heard[who] == 2:  # its version, then that it is ready
                order.append("-")
    return order
