"""The process lane by itself: batches that fail, cores, starting and closing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing import Pipe
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_models import expected, prompts_of, tiny

from splitwiser_lab.errors import LaneError
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.lanes.factory import start_all
from splitwiser_lab.lanes.inline import InlineLane
from splitwiser_lab.lanes.process import ProcessLane, RemoteTicket
from splitwiser_lab.lanes.wire import Failure, send_answer
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence
from splitwiser_lab.model.graph_shapes import UsualWork
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


def test_tickets_get_their_answers_in_whatever_order_they_are_asked(process_lane: ProcessLane) -> None:
    tokens = expected("llama", [PROMPT], 1)[0]
    tickets = [process_lane.submit(prefill()) for _ in range(3)]
    assert tickets[2].result().tokens == tokens
    assert all(ticket.done() for ticket in tickets)
    first, second, third = (ticket.result() for ticket in tickets)
    assert first.end <= second.start and second.end <= third.start


def test_a_worker_that_dies_takes_all_its_batches_with_it(process_lane: ProcessLane) -> None:
    process_lane.start()
    assert process_lane.pid is not None
    os.kill(process_lane.pid, signal.SIGSTOP)
    tickets = [process_lane.submit(prefill()) for _ in range(3)]
    os.kill(process_lane.pid, signal.SIGKILL)
    for ticket in tickets:
        with pytest.raises(LaneError, match="SIGKILL"):
            ticket.result()
        assert ticket.done()
    assert process_lane.submit(prefill()).result().tokens == expected("llama", [PROMPT], 1)[0]


@pytest.mark.parametrize("daemon_ended", [True, False])
def test_a_worker_that_lost_its_gpu_is_given_up(transformer: Transformer, daemon_ended: bool) -> None:
    """Its error comes before the guard has noticed that the daemon died, so the lane waits a moment for the cause."""
    left: list[bool] = []
    daemon = SimpleNamespace(ended=lambda wait: daemon_ended)
    lane = ProcessLane("a", transformer, SimpleNamespace(daemon=daemon))  # type: ignore[arg-type]
    ours, theirs = Pipe()
    lane._ready, lane._child = True, SimpleNamespace(connection=ours, end=lambda: left.append(True))  # type: ignore[assignment]
    tickets = [RemoteTicket(lane), RemoteTicket(lane)]
    lane._under_way.extend(tickets)
    send_answer(theirs, Failure("CUDA error: unspecified launch failure", fatal=True))
    for ticket in tickets:
        with pytest.raises(LaneError, match=r"a batch failed in its process.*\n.*unspecified launch failure") as caught:
            ticket.result()
        assert ("because the MPS daemon ended or was killed" in str(caught.value)) == daemon_ended
    assert lane.pid is None and left == [True]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the pipe is gone")])
def test_a_warm_up_that_is_interrupted_leaves_no_answer_for_the_next_batch(
    transformer: Transformer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Its answer is still to come: the worker is ended, and a new one takes the next batch."""
    lane = ProcessLane("worker", transformer)
    right = lane.submit(prefill()).result().tokens
    old = lane.pid
    lane.on_cpu = False  # on a CPU nobody asks for a warm-up; the worker answers all the same

    def receive(self: ProcessLane) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ProcessLane, "receive", receive)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else LaneError):
            lane.warm_up(UsualWork(rows=4))
    assert lane.pid is None
    lane.on_cpu = True
    assert lane.submit(prefill()).result().tokens == right and lane.pid not in (None, old)
    lane.close()
