"""The vLLM pipeline without vLLM: a fake engine speaks its protocol. Modes, sums of memory, and bad ends."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_vllm import VOCAB, continued
from tiny_models import prompts_of
from vllm_models import fake_python, tiny_for_vllm

from splitwiser_lab import HardwareError, LaneError, ModeError, SplitwiserError, Workload
from splitwiser_lab.pipelines.vllm.pipeline import VllmPipeline

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("no_process_left")]
PROMPTS = prompts_of(40, 12, 25, 60, 33, 1, 7)
NEW = 12
MODES = [
    ("sequential", {}),
    ("sequential", {"chunk_tokens": 32}),
    ("replicas", {"engines": 3}),
    ("split", {"connector": "shared"}),
    ("split", {"connector": "example", "engines": 3}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    tiny_for_vllm(made)
    return made


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fake_python(tmp_path_factory.mktemp("python"))


@pytest.fixture
def pipeline(folder: Path, python: str) -> Iterator[VllmPipeline]:
    with VllmPipeline.from_pretrained(folder, "cpu", vllm_python=python) as made:
        yield made
    assert not made.pids


@pytest.mark.parametrize(("mode", "options"), MODES, ids=lambda value: str(value))
def test_every_mode_gives_each_request_its_tokens(pipeline: VllmPipeline, mode: str, options: dict) -> None:
    pipeline.set_mode(mode, **options)
    result = pipeline.generate(PROMPTS, NEW, ignore_eos=True)
    assert result.tokens == [continued(prompt, NEW) for prompt in PROMPTS]
    assert result.metrics.completed == len(PROMPTS)
    assert pipeline.generate(PROMPTS, 1, ignore_eos=True).tokens == [continued(prompt, 1) for prompt in PROMPTS]
    assert not pipeline.generate(PROMPTS[:2], NEW).spawn_s, "smaller work runs in the engines that are there"
    assert len(result.spawn_s) == pipeline.placement.engines == len(result.engines)


def test_split_hands_each_request_over_once(pipeline: VllmPipeline) -> None:
    pipeline.set_mode("split")
    result = pipeline.generate(PROMPTS, NEW, ignore_eos=True)
    assert [h.batch for h in result.hand_offs] == list(range(len(PROMPTS)))
    assert [h.tokens for h in result.hand_offs] == [len(prompt) for prompt in PROMPTS]
    assert [h.nbytes for h in result.hand_offs] == [1000 * -(-len(prompt) // 32) for prompt in PROMPTS]
    assert all(h.recomputed == 0 and h.wait_s >= 0 and h.write_s > 0 and h.load_s > 0 for h in result.hand_offs)
    for request in result.timeline.requests:
        assert list(request.token_times) == sorted(request.token_times)
        assert request.arrival <= request.scheduled <= request.token_times[0]
        assert request.token_times[0] <= request.hand_off <= request.token_times[1]
    prefilled = [span for span in result.timeline.spans if span.lane == "prefill"]
    assert {span.phase for span in prefilled} == {"prefill"}
    assert sum(span.prefill_tokens for span in prefilled) == sum(map(len, PROMPTS))
    decoded = sum(span.decode_tokens for span in result.timeline.spans if span.lane == "decode")
    assert decoded == (NEW - 1) * len(PROMPTS)


@pytest.mark.parametrize("connector", ["shared", "example"])
def test_prefill_goes_on_while_others_decode_as_far_as_there_are_slots(
    pipeline: VllmPipeline, monkeypatch: pytest.MonkeyPatch, connector: str
) -> None:
    monkeypatch.setattr("splitwiser_lab.pipelines.vllm.memory._MOST_SLOTS", 2)
    pipeline.set_mode("split", connector=connector)
    result = pipeline.generate(PROMPTS, 100, ignore_eos=True)
    assert result.tokens == [continued(prompt, 100) for prompt in PROMPTS]
    requests = result.timeline.requests
    for request in requests:
        between = [r for r in requests if r.scheduled <= request.scheduled < r.token_times[1]]
        assert len(between) <= 2, "a prompt waits for a slot"
    assert requests[2].scheduled < requests[0].finished, "and not for the end of another"


def test_a_request_that_ends_with_its_first_token_is_not_handed_over(folder: Path, python: str) -> None:
    ends = continued(PROMPTS[0], 1)[0]
    with VllmPipeline.from_pretrained(folder, "cpu", mode="split", vllm_python=python) as made:
        object.__setattr__(made.facts, "eos_token_ids", (ends,))
        result = made.generate(PROMPTS, NEW)
    for prompt, tokens, request in zip(PROMPTS, result.tokens, result.requests, strict=True):
        free = continued(prompt, NEW)
        wanted = free[: free.index(ends) + 1] if ends in free else free
        assert tokens == wanted and request.finish_reason == ("stop" if ends in free else "length")
    assert 0 not in {h.batch for h in result.hand_offs}


def test_replicas_take_turns_and_arrivals_are_kept(pipeline: VllmPipeline) -> None:
    pipeline.set_mode("replicas", 2)
    workload = Workload.poisson(100.0, requests=6, prompt_tokens=20, output_tokens=4, seed=3)
    result = pipeline.run(workload)
    due = workload.requests(VOCAB)
    assert result.tokens == [continued(item.prompt, 4) for item in due]
    assert [round(r.arrival, 6) for r in result.timeline.requests] == [round(item.arrival_s, 6) for item in due]
    lanes = {span.lane: 0 for span in result.timeline.spans}
    for span in result.timeline.spans:
        lanes[span.lane] += span.decode_tokens
    assert lanes == {"engine 0": 9, "engine 1": 9}


def test_engines_can_be_launched_and_awaited_later(pipeline: VllmPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.set_mode("replicas", 3)
    work = Workload.closed(PROMPTS, output_tokens=NEW)
    pipeline.launch(work)
    pids = pipeline.pids
    assert len(pids) == 3 and not pipeline.engines, "nobody has waited for them"
    time.sleep(0.5)  # now they have told that they are ready
    result = pipeline.generate(PROMPTS, NEW, ignore_eos=True)
    assert result.tokens == [continued(prompt, NEW) for prompt in PROMPTS]
    assert pipeline.pids == pids and not result.spawn_s and len(pipeline.engines) == 3
    pipeline.set_mode("sequential")
    monkeypatch.setenv("FAKE_VLLM", "no room")
    pipeline.launch(work)
    with pytest.raises(LaneError, match="no room for the KV cache"):
        pipeline.generate(PROMPTS, NEW)
    assert not pipeline.pids
    check_works(pipeline, monkeypatch)


# -- memory


def test_replicas_divide_the_kv_budget(pipeline: VllmPipeline) -> None:
    workload = Workload.closed(8, prompt_tokens=40, output_tokens=20)
    budgets = {}
    for engines in (1, 2, 4):
        pipeline.set_mode("replicas", engines)
        pipeline.start(workload)
        budgets[engines] = pipeline._team.budget.kv_bytes  # type: ignore[union-attr]
    spare = 2 * 128 * 1024  # of an engine, in no request
    assert [sum(n - spare for n in budgets[engines]) for engines in (1, 2, 4)] == [8 * 64 * 1024] * 3
    assert len(set(budgets[4])) == 1


def test_more_engines_than_memory_are_refused_with_the_sum(
    pipeline: VllmPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitwiser_lab.pipelines.vllm.team.settled_free_bytes", lambda device: 2 * 2**30)
    pipeline.set_mode("replicas", 8)
    with pytest.raises(
        HardwareError, match=r"8 × \(0.00 GiB weights \+ 0.68 GiB process .*= 5.4.*1.80 GiB: use at most 2"
    ):
        pipeline.generate(PROMPTS, NEW)
    assert not pipeline.pids
    pipeline.set_mode("replicas", 2)
    assert pipeline.generate(PROMPTS, NEW, ignore_eos=True).metrics.completed == len(PROMPTS)


# -- bad ends


def check_works(made: VllmPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_VLLM", raising=False)
    assert made.generate(PROMPTS, NEW, ignore_eos=True).tokens == [continued(prompt, NEW) for prompt in PROMPTS]


def leftovers() -> tuple[int, set[str]]:
    """Shared memory that this process holds, and folders for keys and values."""
    gc.collect()
    fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)]
    return sum("splitwiser_lab" in fd for fd in fds), {str(p) for p in Path("/dev/shm").glob("splitwiser-kv-*")}


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux shows what a process holds")
@pytest.mark.parametrize(
    ("mode", "options", "fault", "who"),
    [
        ("sequential", {}, "die both 3", "engine 0"),
        ("split", {"connector": "shared"}, "die decode 3", "decode"),
        ("split", {"connector": "example"}, "die prefill 0", "prefill"),
    ],
)
def test_an_engine_that_dies_is_named_and_the_next_run_works(
    pipeline: VllmPipeline, monkeypatch: pytest.MonkeyPatch, mode: str, options: dict, fault: str, who: str
) -> None:
    before = leftovers()
    monkeypatch.setenv("FAKE_VLLM", fault)
    pipeline.set_mode(mode, **options)
    with pytest.raises(
        LaneError, match=rf"vLLM's {who}: its process .* SIGKILL(?s:.*)It said: the fake engine was told"
    ):
        pipeline.generate(PROMPTS, NEW, ignore_eos=True)
    assert not pipeline.pids and leftovers() == before
    check_works(pipeline, monkeypatch)
    for pid in pipeline.pids.values():  # between two runs
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], 10)
    check_works(pipeline, monkeypatch)
    pipeline.close()
    pipeline.close()
    assert leftovers() == before
    with pytest.raises(SplitwiserError, match="closed"):
        pipeline.generate(PROMPTS, NEW)


def test_an_interrupt_ends_the_run_and_its_processes(pipeline: VllmPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "slow")
    pipeline.set_mode("split")
    pipeline.start(Workload.closed(PROMPTS, output_tokens=150))
    pids, started = pipeline.pids, time.monotonic()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(PROMPTS, 150, ignore_eos=True)
    timer.join()
    assert time.monotonic() - started < 20
    assert not any(psutil.pid_exists(pid) for pid in pids.values())
    check_works(pipeline, monkeypatch)


def test_an_interrupt_while_engines_start_leaves_none(pipeline: VllmPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before = leftovers()
    monkeypatch.setenv("FAKE_VLLM", "deaf")
    pipeline.set_mode("split", connector="example")
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(PROMPTS, NEW)
    timer.join()
    assert not pipeline.pids and leftovers() == before
    check_works(pipeline, monkeypatch)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("version 0.11.0", ModeError, r"vLLM 0.11.0, and this pipeline knows 0.24 to 0.32.*make vllm"),
        ("no vllm", ModeError, "python has no vLLM: set one up by `make vllm`"),
        ("no room", LaneError, "engine 0 failed: ValueError: no room for the KV cache"),
    ],
)
def test_engines_that_do_not_start(
    pipeline: VllmPipeline, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setenv("FAKE_VLLM", fault)
    with pytest.raises(error, match=message):
        pipeline.generate(PROMPTS, NEW)
    assert not pipeline.pids
    check_works(pipeline, monkeypatch)


def test_a_connector_that_this_vllm_lacks_is_named(pipeline: VllmPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "no connector")
    pipeline.set_mode("split", connector="example")
    with pytest.raises(ModeError, match=r"vLLM 0.32.0 cannot use the connector 'example' .*try connector='shared'"):
        pipeline.generate(PROMPTS, NEW)
    assert not pipeline.pids
    check_works(pipeline, monkeypatch)
