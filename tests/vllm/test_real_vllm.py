"""Real vLLM on a CPU: every mode writes the tokens of transformers, and bad ends leave nothing.

Skipped where there is no vLLM; with SPLITWISER_LAB_NEED_VLLM in the environment (`make test-vllm`) that is a failure.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from conftest import children
from tiny_models import generated, prompts_of
from transformers import PreTrainedModel
from typer.testing import CliRunner
from vllm_models import tiny_for_vllm

from splitwiser_lab import HardwareError, LaneError, VllmPipeline, Workload
from splitwiser_lab.cli import app
from splitwiser_lab.measure.peers import find_vllm
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.model.fetch import find_model
from splitwiser_lab.pipelines.document import Reproduction

PYTHON = find_vllm(os.environ.get("SPLITWISER_LAB_VLLM"))
pytestmark = pytest.mark.timeout(200)
NEW = 20
PROMPTS = prompts_of(100, 40, 7, 64, 33, 1, 90, 65)  # 64 fills its blocks exactly, 65 and 33 begin a new one
MODES = [
    ("sequential", {}),
    ("sequential", {"chunk_tokens": 64}),
    ("replicas", {"engines": 2}),
    ("split", {"connector": "shared"}),
    ("split", {"connector": "example"}),
]


@pytest.fixture(scope="module", autouse=True)
def vllm_is_here() -> None:
    if PYTHON is None:
        assert not os.environ.get("SPLITWISER_LAB_NEED_VLLM"), "no Python with vLLM was found"
        pytest.skip("no Python with vLLM: `make vllm` sets one up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return tiny_for_vllm(folder)


@pytest.fixture(scope="module", params=MODES, ids=str)
def placed(request: pytest.FixtureRequest, folder: Path, model: PreTrainedModel) -> Iterator[VllmPipeline]:
    """One after the other: each mode's engines start once."""
    mode, options = request.param
    before = set(children())
    with VllmPipeline.from_pretrained(folder, "cpu", mode=mode, vllm_python=PYTHON, **options) as made:
        yield made
    assert not set(children()) - before, "engines are still there"


def test_tokens_and_times(placed: VllmPipeline, model: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    wanted = [generated(model, prompt, NEW) for prompt in PROMPTS]
    assert sum(len(set(tokens)) for tokens in wanted) > 0.3 * NEW * len(wanted), "loops would hide mistakes"
    result = placed.generate(PROMPTS, NEW, ignore_eos=True)
    assert result.tokens == wanted
    assert placed.generate(PROMPTS, NEW, ignore_eos=True).tokens == wanted, "a second run finds nothing of the first"
    assert placed.generate(PROMPTS, 1, ignore_eos=True).tokens == [tokens[:1] for tokens in wanted]
    assert all(engine.version and engine.kv_tokens >= 128 for engine in result.engines)
    assert len(result.spawn_s) == placed.placement.engines
    if hasattr(os, "sched_getaffinity"):
        cores = [thread_cores(pid) for pid in placed.pids.values()]
        assert cores == [set(own) for own in placed.placement.cores()], "no engine computes on another's cores"
    check_timeline(result, placed)
    if placed.placement.mode == "split":
        check_hand_offs(result, placed)


def thread_cores(pid: int) -> set[int]:
    """Cores on which any thread of a process may run."""
    return set().union(*(os.sched_getaffinity(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")))


def check_timeline(result, placed: VllmPipeline) -> None:
    for request in result.timeline.requests:
        times = list(request.token_times)
        assert len(times) == NEW and times == sorted(times)
        assert request.arrival <= request.scheduled < times[0]
        assert request.finished == times[-1] <= result.timeline.duration
    for lane in result.timeline.lanes:
        own = sorted((span for span in result.timeline.spans if span.lane == lane), key=lambda span: span.start)
        assert all(a.end <= b.start for a, b in pairwise(own)), "an engine does one step at a time"
    recomputed = sum(h.recomputed for h in result.hand_offs)
    assert sum(span.prefill_tokens for span in result.timeline.spans) == sum(map(len, PROMPTS)) + recomputed
    assert sum(span.decode_tokens for span in result.timeline.spans) == (NEW - 1) * len(PROMPTS)
    if placed.placement.chunk_tokens:
        assert max(s.prefill_tokens + s.decode_tokens for s in result.timeline.spans) <= placed.placement.chunk_tokens


def check_hand_offs(result, placed: VllmPipeline) -> None:
    moved, token = {h.batch: h for h in result.hand_offs}, 2 * 2 * 2 * 32 * 4  # layers, K and V, heads, dim, float32
    assert sorted(moved) == list(range(len(PROMPTS)))
    for index, prompt in enumerate(PROMPTS):
        hand_off, whole = moved[index], (len(prompt) - 1) // 32 * 32
        assert hand_off.wait_s >= 0 and (hand_off.write_s > 0) == (hand_off.load_s > 0) == (hand_off.nbytes > 0)
        if placed.placement.connector == "shared":
            assert (hand_off.tokens, hand_off.recomputed) == (len(prompt), 0)
        else:
            assert (hand_off.tokens, hand_off.recomputed) == (whole, len(prompt) - whole)
    nbytes = sum(h.nbytes for h in result.hand_offs)
    blocks = [-(-len(p) // 32) if placed.placement.connector == "shared" else (len(p) - 1) // 32 for p in PROMPTS]
    assert nbytes == pytest.approx(32 * token * sum(blocks), rel=0.01)


def test_each_request_has_its_own_length_end_and_arrival(placed: VllmPipeline, model: PreTrainedModel) -> None:
    workload = Workload.poisson(20.0, requests=5, prompt_tokens=50, output_tokens=6, seed=3)
    result = placed.run(workload)
    due = workload.requests(placed.facts.vocab_size)
    assert result.tokens == [generated(model, item.prompt, item.max_new_tokens) for item in due]
    assert all(r.scheduled >= r.arrival for r in result.timeline.requests)
    ends = generated(model, PROMPTS[0], 5)[4]
    object.__setattr__(placed.facts, "eos_token_ids", (ends,))
    try:
        tokens = placed.generate(PROMPTS[:4], NEW).tokens
    finally:
        object.__setattr__(placed.facts, "eos_token_ids", ())
    for prompt, found in zip(PROMPTS[:4], tokens, strict=True):
        free = generated(model, prompt, NEW)
        assert found == (free[: free.index(ends) + 1] if ends in free else free)


def test_bad_ends_leave_nothing_and_the_next_run_works(
    folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, no_process_left: None
) -> None:
    wanted = [generated(model, prompt, NEW) for prompt in PROMPTS[:3]]
    with VllmPipeline.from_pretrained(folder, "cpu", mode="split", vllm_python=PYTHON) as made:
        with monkeypatch.context() as short:
            short.setattr("splitwiser_lab.pipelines.vllm.team.settled_free_bytes", lambda device: 2**30)
            with pytest.raises(HardwareError, match=r"2 × .* process .* GiB: "):
                made.generate(PROMPTS[:3], NEW)
        made.start(Workload.closed([p[:40] for p in PROMPTS * 4], output_tokens=200))
        pids = made.pids
        os.kill(pids["decode"], signal.SIGSTOP)  # so that work is surely under way in it when it dies
        killer = threading.Timer(0.5, os.kill, (pids["decode"], signal.SIGKILL))
        killer.start()
        with pytest.raises(LaneError, match=r"vLLM's decode.*SIGKILL.*requests are lost"):
            made.generate([p[:40] for p in PROMPTS * 4], 200, ignore_eos=True)
        killer.join()
        assert not any(psutil.pid_exists(pid) for pid in pids.values()), "the other has ended, too"
        assert made.generate(PROMPTS[:3], NEW, ignore_eos=True).tokens == wanted
        pids = made.pids
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            made.generate(PROMPTS[:3], NEW, ignore_eos=True)
        timer.join()
        assert not any(psutil.pid_exists(pid) for pid in pids.values())


def test_the_experiment_is_run_again_by_one_command(
    folder: Path, model: PreTrainedModel, tmp_path: Path, no_process_left: None
) -> None:
    words = ["reproduce", "--pipeline", "vllm", "--model", str(folder), "--device", "cpu", "--vllm", str(PYTHON)]
    words += ["--mode", "split", "--input", "40", "--output", "6", "--requests", "5", "--repeats", "1"]
    words += ["--eager", "--max-batch", "2", "--rate", "80%", "--start-together"]
    result = CliRunner().invoke(app, [*words, "--no-engine", "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    found = Reproduction.load(tmp_path / "r.json")
    ways = ["generate", "sequential", "split × 2, shared", "split × 2, example"]
    assert [row.name for row in found.rows] == [*ways, *ways[1:]]
    assert [row.rate is None for row in found.rows] == [True] * 4 + [False] * 3
    assert all(row.figure("p99_itl_ms") and row.figure("median_ttft_ms") for row in found.rows[4:])
    assert found.work.eager and found.work.max_batch == 2 and "shortest TTFT p99" in found.notes()[1]
    assert all(row.tokens_identical for row in found.rows) and found.pipeline == "vllm"
    assert found.origin["versions"]["vllm"] != "not run"
    shared, example = found.rows[2:4]
    assert shared.figure("recomputed_tokens") == 0 and example.figure("recomputed_tokens") == 5 * 8
    assert shared.figure("hand_off_write_ms") and example.figure("hand_off_load_ms")
    assert shared.figure("spawn_s") is None, "of starts side by side nobody knows what each takes"


@pytest.mark.model
def test_a_real_model_split_writes_the_text_of_transformers(no_process_left: None) -> None:
    from transformers import AutoModelForCausalLM

    with VllmPipeline.from_pretrained("smollm2-135m", "cpu", mode="split", vllm_python=PYTHON) as made:
        result = made.generate(["The capital of France is", "Prefill and decode differ because"], 12, ignore_eos=True)
    reference = Reference(AutoModelForCausalLM.from_pretrained(find_model("smollm2-135m")[0]).float().eval())
    assert "Paris" in result.texts[0]
    for request in result.requests:
        assert request.output == reference.tokens(request.prompt, 12, ignore_eos=True)
