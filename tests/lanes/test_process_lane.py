"""The process lane by itself: batches that fail, cores, starting and closing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest
import torch
from tiny_models import expected, prompts_of, tiny

from splitwiser_lab.errors import LaneError, ModeError
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.lanes.factory import LaneHouse, share_cores, start_all
from splitwiser_lab.lanes.inline import InlineLane
from splitwiser_lab.lanes.process import ProcessLane
from splitwiser_lab.lanes.support import why_not
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.loading import load
from splitwiser_lab.model.transformer import Transformer

pytestmark = pytest.mark.timeout(120)
(PROMPT,) = prompts_of(30)
TABLE = [9, 2, 30, 11, 4]


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    weights = load(tiny("llama"), "cpu", torch.float32).weights
    return Transformer(weights, KVPool(weights.config, torch.float32, "cpu", 64, 8))


@pytest.fixture(scope="module")
def process_lane(transformer: Transformer) -> Iterator[ProcessLane]:
    lane = ProcessLane("worker", transformer)
    yield lane
    lane.close()


@pytest.fixture(params=["inline", "process"])
def lane(request: pytest.FixtureRequest, transformer: Transformer) -> Lane:
    if request.param == "inline":
        return InlineLane("worker", transformer)
    return request.getfixturevalue("process_lane")


def prefill() -> Batch:
    return Batch([], [Sequence(PROMPT, 0, TABLE, GREEDY)])


def test_prefill_here_and_decode_there(transformer: Transformer, process_lane: ProcessLane) -> None:
    """One pool: what this process writes, the other reads, and the other way round."""
    here, wanted = InlineLane("here", transformer), expected("llama", [PROMPT], 8)[0]
    tokens = here.submit(prefill()).result().tokens
    for number in range(1, 8):
        lane = process_lane if number % 2 else here
        step = Sequence(tokens[-1:], 29 + number, TABLE, GREEDY)
        result = lane.submit(Batch([step], [])).result()
        assert result.start < result.end
        tokens += result.tokens
    assert tokens == wanted


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (Batch([], [Sequence([10**6], 0, [0], GREEDY)]), "IndexError"),
        (Batch([], [Sequence([-1], 0, [0], GREEDY)]), "IndexError"),
        (Batch([], [Sequence([1], 0, [10**6], GREEDY)]), "IndexError"),
        (Batch([], [Sequence([1] * 20, 0, [0], GREEDY)]), "IndexError"),
    ],
    ids=["token out of vocabulary", "negative token", "page out of pool", "table too short"],
)
def test_a_batch_that_fails_is_reported_and_the_lane_goes_on(lane: Lane, batch: Batch, kind: str) -> None:
    pid = getattr(lane, "pid", None)
    with pytest.raises(LaneError, match="lane 'worker': a batch failed") as caught:
        lane.submit(batch).result()
    if isinstance(lane, ProcessLane):
        assert "Traceback" in str(caught.value) and kind in str(caught.value), "the worker's own traceback"
        assert lane.pid == pid or pid is None, "the worker survives"
    else:
        assert type(caught.value.__cause__).__name__ == kind
    assert lane.submit(prefill()).result().tokens == expected("llama", [PROMPT], 1)[0]


def test_start_and_close_as_often_as_you_like(transformer: Transformer, no_process_left: None) -> None:
    lane = ProcessLane("worker", transformer)
    lane.close()
    assert lane.pid is None
    lane.start()
    pid = lane.pid
    lane.start()
    lane.spawn()
    assert lane.pid == pid is not None
    lane.close()
    lane.close()
    assert lane.pid is None and not psutil.pid_exists(pid)
    assert lane.submit(prefill()).result().tokens == expected("llama", [PROMPT], 1)[0], "started anew when asked"
    assert lane.pid != pid
    lane.close()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin")
def test_the_worker_computes_on_the_cores_of_its_lane(process_lane: ProcessLane) -> None:
    available = sorted(os.sched_getaffinity(0))
    for cores in ([available[-1]], available):
        process_lane.cores = cores
        process_lane.submit(prefill()).result()
        threads = psutil.Process(process_lane.pid).threads()
        assert {tuple(sorted(os.sched_getaffinity(thread.id))) for thread in threads} == {tuple(cores)}
    assert sorted(os.sched_getaffinity(0)) == available, "this process keeps its own"


def test_a_lane_that_is_stuck_says_so(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitwiser_lab.lanes.process._START_SECONDS", 0.01)
    lane = ProcessLane("worker", transformer)
    with pytest.raises(LaneError, match="'worker': its process did not start within"):
        lane.start()
    assert lane.pid is None


def test_start_all_reports_the_first_failure_and_starts_the_rest(transformer: Transformer) -> None:
    class Broken(ProcessLane):
        def start(self) -> None:
            self.close()
            raise LaneError(f"{self.name} is broken")

    lanes: list[Lane] = [Broken("one", transformer), ProcessLane("two", transformer), Broken("three", transformer)]
    with pytest.raises(LaneError, match="one is broken"):
        start_all(lanes)
    assert lanes[1].submit(prefill()).result().tokens == expected("llama", [PROMPT], 1)[0]
    lanes[1].close()


# -- what the factory decides


def lanes_of(transformer: Transformer, kind: type) -> list[Lane]:
    return [kind("prefill", transformer), kind("decode", transformer)]


@pytest.mark.parametrize(
    ("available", "decode_cores", "shares"),
    [
        ([0, 1], None, {"decode": [0], "prefill": [1]}),
        ([0, 1, 2, 3, 4], None, {"decode": [0, 1], "prefill": [2, 3, 4]}),
        ([2, 5, 7, 9], 1, {"decode": [2], "prefill": [5, 7, 9]}),
        ([2, 5, 7, 9], 3, {"decode": [2, 5, 7], "prefill": [9]}),
        ([3], None, {"decode": [3], "prefill": [3]}),
        ([3], 1, {"decode": [3], "prefill": [3]}),
    ],
)
def test_shares_of_the_cores(
    transformer: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    available: list[int],
    decode_cores: int | None,
    shares: dict[str, list[int]],
) -> None:
    monkeypatch.setattr("splitwiser_lab.lanes.factory.cores", lambda: available)
    assert share_cores(lanes_of(transformer, ProcessLane), decode_cores) == shares
    assert share_cores(lanes_of(transformer, InlineLane)) == {}


@pytest.mark.parametrize("decode_cores", [4, 5, 100])
def test_a_share_that_leaves_none(transformer: Transformer, monkeypatch: pytest.MonkeyPatch, decode_cores: int) -> None:
    monkeypatch.setattr("splitwiser_lab.lanes.factory.cores", lambda: [0, 1, 2, 3])
    with pytest.raises(ModeError, match=f"decode_cores={decode_cores} leaves none.*4 cores.*at most 3"):
        share_cores(lanes_of(transformer, ProcessLane), decode_cores)


def test_kinds_that_cannot_be_built_say_why(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("inline", "cpu") is why_not("process", "cpu") is why_not("inline", "cuda") is None
    with pytest.raises(ModeError, match=r"'stream'.*GPU"):
        LaneHouse(transformer).build("stream", "decode", {})
    monkeypatch.setattr("sys.platform", "win32")
    assert "Linux, macOS" in (why_not("process", "cpu") or "")
