"""Every mechanism on a real GPU: the same tokens, disjoint SMs, flips in mid-run, and nothing left after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import splitwiser_lab as sl
from splitwiser_lab.engine import auto as auto_module
from splitwiser_lab.engine.controller import Decision
from splitwiser_lab.lanes.mps_guard import users_of
from splitwiser_lab.lanes.partition import Partition, grid_of
from splitwiser_lab.lanes.process import ProcessLane
from splitwiser_lab.measure.reference import Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none"),
]

SPLIT = ["streams", "partitioned", "processes", "mps"]
SHAPE = {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 512}
NEW = 40


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **heads, initializer_range=0.3)).to("cuda").eval()


def prompts(count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 90, (count,), generator=generator).tolist()
    return [torch.randint(5, 199, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    reference = Reference(model())
    tokens = [reference.tokens(prompt, NEW, ignore_eos=True) for prompt in prompts()]
    assert len({token for row in tokens for token in row}) > 20
    return tokens


@pytest.fixture(scope="module")
def engine() -> Iterator[sl.Engine]:
    """One engine whose lanes start once."""
    with sl.Engine.from_pretrained(model(), dtype="float32", device="cuda", kv_tokens=4096) as engine:
        yield engine


def choose(engine: sl.Engine, mode: str, **options: Any) -> None:
    """Set the mode, or skip with the reason that this machine gives."""
    support = {found.mode: found for found in sl.supported_modes("cuda")}[mode]
    if not support.available:
        pytest.skip(f"{mode}: {support.reason}")
    engine.set_mode(mode, **options)


def pids_of(engine: sl.Engine) -> dict[str, int]:
    """Process ids of the lanes in use, by name."""
    return {lane.name: lane.pid for lane in engine._core.lanes if isinstance(lane, ProcessLane) and lane.pid}


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("mode", ["sequential", "chunked", *SPLIT])
def test_float32_tokens_are_those_of_transformers(engine: sl.Engine, expected: list[list[int]], mode: str) -> None:
    choose(engine, mode)
    for _ in range(2):
        began = time.perf_counter()
        result = engine.generate(prompts(), NEW, ignore_eos=True)
        took = time.perf_counter() - began
        assert result.tokens == expected
    spans = result.timeline.spans
    assert {span.lane for span in spans} == ({"prefill", "decode"} if mode in SPLIT else {"main"})
    assert all(-1e-3 <= span.start < span.end <= took + 1e-3 for span in spans), "on this process's clock"
    decode = sorted((span for span in spans if span.phase == "decode"), key=lambda span: span.start)
    assert all(a.end <= b.start + 1e-4 for a, b in pairwise(decode)), "one batch at a time"


@pytest.mark.parametrize("options", [{}, {"itl_limit_ms": 5}, {"with_processes": 1}], ids=str)
def test_auto_writes_the_tokens_of_transformers(
    engine: sl.Engine, expected: list[list[int]], options: dict[str, int]
) -> None:
    """As it chooses for itself; `explain` names every mechanism that this machine has."""
    engine.set_mode("auto", **options)
    for _ in range(3):
        assert engine.generate(prompts(), NEW, ignore_eos=True).tokens == expected
    said = engine.explain()
    print(said)
    assert "auto runs" in said and "streams" in said and "partitioned" in said


def test_auto_may_choose_anything_at_any_time(
    engine: sl.Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through all its choices, one after the other, while prompts and tokens are under way."""
    chosen = []
    core = engine._core

    def decide(found: Any, rates: Any, load: Any, current: Any, limit: Any) -> Decision:
        """The next one, after a batch in this one: who always wants another never runs anything."""
        if core.spans and core.spans[-1].start > core.mode.time:
            chosen.append(found[(found.index(current) + 1) % len(found)])
            return Decision(chosen[-1], "the next one", load)
        return Decision(current, "it has run nothing yet", load)

    monkeypatch.setattr(auto_module, "decide", decide)
    for wait in ("_LOOK_SECONDS", "_DRY_SECONDS", "_DWELL_SECONDS"):
        monkeypatch.setattr(auto_module, wait, 0.0)
    engine.set_mode("auto", with_processes=1)
    while len(chosen) < 60:
        assert engine.generate(prompts(), NEW, ignore_eos=True).tokens == expected
    ran = {change.runs.split()[0] for change in engine.timeline().modes if change.mode == "auto"}
    assert {"sequential", "chunked", "streams"} <= ran, ran


def test_flips_over_all_modes_change_no_token(expected: list[list[int]]) -> None:
    modes = [found.mode for found in sl.supported_modes("cuda") if found.available and found.mode != "auto"]
    with sl.Engine.from_pretrained(model(), dtype="float32", device="cuda", kv_tokens=512, page_size=16) as engine:
        for mode in modes:  # the lanes start here
            engine.set_mode(mode)
        flips = iter(modes * 4)
        tokens = 0

        def flip(request: Any, token: int) -> None:
            nonlocal tokens
            tokens += 1
            if tokens % 15 == 0 and (mode := next(flips, None)):
                engine.set_mode(mode)

        result = engine.generate(prompts(), NEW, ignore_eos=True, on_token=flip)
    assert result.tokens == expected
    assert {span.mode for span in result.timeline.spans} == set(modes)
    assert sum(record.preemptions for record in result.timeline.requests) > 0


def test_partitions_of_every_kind_of_split(engine: sl.Engine, expected: list[list[int]]) -> None:
    allowed = grid_of(0).allowed
    for sms in {allowed[0], allowed[len(allowed) // 2], allowed[-1]}:
        choose(engine, "partitioned", decode_sms=sms)
        assert engine.generate(prompts(), NEW, ignore_eos=True).tokens == expected
    with pytest.raises(sl.ModeError, match=f"decode_sms={allowed[-1] + 1} is not possible.*multiple of"):
        engine.set_mode("partitioned", decode_sms=allowed[-1] + 1)


def test_the_parts_of_the_gpu_are_disjoint() -> None:
    """By what the SMs themselves say: a kernel notes where its blocks ran."""
    from sm_kernel import sms_used

    total = torch.cuda.get_device_properties(0).multi_processor_count
    allowed = grid_of(0).allowed
    assert sms_used(torch.cuda.Stream()) == set(range(total))
    for sms in (allowed[0], allowed[len(allowed) // 2]):
        partition = Partition(0, sms)
        decode, prefill = sms_used(partition.decode), sms_used(partition.prefill)
        assert len(decode) == sms == partition.decode_sms
        assert len(prefill) == total - sms == partition.prefill_sms
        assert not decode & prefill


@pytest.mark.parametrize("shares", [(75, 25), (50, 50)])
def test_shares_of_mps(engine: sl.Engine, expected: list[list[int]], shares: tuple[int, int]) -> None:
    choose(engine, "mps", prefill_share=shares[0], decode_share=shares[1])
    assert engine.generate(prompts(), NEW, ignore_eos=True).tokens == expected
    assert len(pids_of(engine)) == 2
    with pytest.raises(sl.ModeError, match="decode_share=101"):
        engine.set_mode("mps", decode_share=101)


@pytest.mark.parametrize("mode", ["processes", "mps"])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_killed_lane_process(engine: sl.Engine, expected: list[list[int]], mode: str, name: str) -> None:
    choose(engine, mode, max_batch=4)
    pid = pids_of(engine)[name]
    seen = []

    def kill(request: Any, token: int) -> None:
        seen.append(token)
        if len(seen) == 30:
            os.kill(pid, signal.SIGKILL)

    try:
        assert engine.generate(prompts(), NEW, ignore_eos=True, on_token=kill).tokens == expected, "it was idle"
    except sl.GenerationError as error:
        assert "lane '" in str(error)
    assert engine.generate(prompts(), NEW, ignore_eos=True).tokens == expected
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("victim", ["control", "server", "guard"])
def test_a_killed_mps_daemon(engine: sl.Engine, expected: list[list[int]], victim: str) -> None:
    choose(engine, "mps")
    daemon = engine._house._daemon
    assert daemon is not None and not daemon.ended()
    folder = daemon._folder
    known = {process.name(): process for process in users_of(folder)}
    print({name: process.pid for name, process in known.items()})
    process = psutil.Process(daemon.pid) if victim == "guard" else known[f"nvidia-cuda-mps-{victim}"]
    seen = []

    def kill(request: Any, token: int) -> None:
        seen.append(token)
        if len(seen) == 30:
            process.kill()

    try:  # it may be over before the guard has noticed
        engine.generate(prompts(), 400, ignore_eos=True, on_token=kill)
    except sl.GenerationError as error:
        assert "because the MPS daemon ended or was killed" in str(error)
    assert eventually(lambda: daemon.ended() or daemon._folder != folder)
    assert engine.generate(prompts(), NEW, ignore_eos=True).tokens == expected, "with a new daemon, at the next call"
    assert eventually(lambda: not users_of(folder)), users_of(folder)
    assert not os.path.exists(folder)


PARENT = textwrap.dedent("""
    import json, sys, torch
    sys.path.insert(0, sys.argv[2])
    import splitwiser_lab as sl
    from test_mechanisms import model, prompts, pids_of
    engine = sl.Engine.from_pretrained(model(), dtype="float32", device="cuda", kv_tokens=2_000_000)
    engine.set_mode(sys.argv[1])
    daemon = engine._house._daemon
    def tell(request, token):
        if len(request.output) == 20:
            print(json.dumps([*pids_of(engine).values(), *([daemon.pid] if daemon else [])]), flush=True)
    while True:
        engine.generate(prompts(), 200, ignore_eos=True, on_token=tell)
""")


@pytest.mark.parametrize("mode", ["sequential", "partitioned", "processes", "mps"])
def test_a_killed_parent_leaves_nothing(mode: str) -> None:
    import json

    import pynvml

    if not {found.mode: found for found in sl.supported_modes("cuda")}[mode].available:
        pytest.skip(f"{mode} does not run here")
    torch.cuda.synchronize()
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used() -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)

    before = used()
    here = os.path.dirname(__file__)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, mode, here], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = json.loads(parent.stdout.readline())
    during = used()
    folders = {psutil.Process(pid).environ().get("CUDA_MPS_PIPE_DIRECTORY") for pid in pids} - {None}
    parent.kill()
    parent.wait()
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids)), "a lane process is left"
    assert eventually(lambda: not any(users_of(folder) for folder in folders)), "a daemon is left"
    assert not any(os.path.exists(folder) for folder in folders)
    print(mode, "MiB before, during, after:", before >> 20, during >> 20, used() >> 20)
    assert during > before + 2**29
    assert eventually(lambda: used() <= before + 2**24), f"{(used() - before) >> 20} MiB of GPU memory are left"


def test_closing_ends_processes_and_daemon() -> None:
    with sl.Engine.from_pretrained(model(), dtype="float32", device="cuda", kv_tokens=4096) as engine:
        pids: list[int] = []
        for mode in ("processes", "mps"):
            choose(engine, mode)
            pids += pids_of(engine).values()
        assert len(pids) == 4
        daemon = engine._house._daemon
        assert daemon is not None
        folder, guard = daemon._folder, daemon.pid
    assert not any(psutil.pid_exists(pid) for pid in [*pids, guard])
    assert not users_of(folder) and not os.path.exists(folder)
