"""The process lane by itself: batches that fail, cores, starting and closing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_models import expected, prompts_of, tiny

from splitwiser_lab.errors import LaneError, ModeError
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.lanes.factory import LaneHouse, share_cores, start_all
from splitwiser_lab.lanes.inline import InlineLane
from splitwiser_lab.lanes.process import ProcessLane, RemoteTicket
from splitwiser_lab.lanes.support import why_not
from splitwiser_lab.lanes.wire import Failure, Sender, receive_answer, send_answer
from splitwiser_lab.lanes.worker import Server
from splitwiser_lab.model.batch import GREEDY, Batch, BatchResult, Sequence
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


# -- the worker's loop, by itself


class Slow:
    """A lane of depth 2 whose batches are done when the test says so."""

    depth = 2

    def __init__(self) -> None:
        self.submitted: list[Batch] = []
        self.done: set[int] = set()
        self.fails: set[int] = set()

    def submit(self, batch: Batch) -> SlowTicket:
        self.submitted.append(batch)
        if len(self.submitted) in self.fails:
            raise LaneError("this one cannot be launched")
        return SlowTicket(self, len(self.submitted))


class SlowTicket:
    def __init__(self, lane: Slow, number: int) -> None:
        self.lane, self.number = lane, number

    def done(self) -> bool:
        return self.number in self.lane.done

    def result(self) -> BatchResult:
        return BatchResult([self.number], 0.0, 1.0)

    def connection(self) -> None:
        return None


class Served:
    """A server over a slow lane in a thread; `ask` sends a batch, `answer` waits for the next answer."""

    def __init__(self, lane: Slow) -> None:
        self.lane, self.sender = lane, Sender()
        self.ours, theirs = Pipe()
        self.thread = threading.Thread(target=self._run, args=(theirs,), daemon=True)
        self.thread.start()

    def _run(self, theirs: Connection) -> None:
        with theirs, contextlib.suppress(EOFError, ConnectionError):
            Server(theirs, self.lane).run()  # type: ignore[arg-type]

    def ask(self, start: int) -> None:
        self.ours.send_bytes(self.sender.pack(Batch([Sequence([1], start, [3, 4], GREEDY)], []), None))

    def answer(self) -> object:
        assert self.ours.poll(5), "no answer"
        return receive_answer(self.ours)

    def until(self, count: int) -> None:
        deadline = time.monotonic() + 5
        while len(self.lane.submitted) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(self.lane.submitted) == count


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served(Slow())
    yield served
    served.lane.done |= set(range(100))
    served.ours.close()
    served.thread.join(5)
    assert not served.thread.is_alive(), "it ends when its pipe closes"


def test_the_next_batch_is_launched_before_the_last_is_done_and_no_third(served: Served) -> None:
    for start in (10, 11, 12):
        served.ask(start)
    served.until(2)
    time.sleep(0.05)
    assert len(served.lane.submitted) == 2, "the lane takes two at a time"
    served.lane.done.add(1)
    assert served.answer() == BatchResult([1], 0.0, 1.0)
    served.until(3)
    assert [batch.decode[0].start for batch in served.lane.submitted] == [10, 11, 12]
    served.lane.done |= {2, 3}
    assert [served.answer(), served.answer()] == [BatchResult([2], 0.0, 1.0), BatchResult([3], 0.0, 1.0)]


def test_answers_keep_their_order_when_one_fails(served: Served) -> None:
    served.lane.fails.add(2)
    for start in (10, 11, 12):
        served.ask(start)
    served.until(2)
    assert not served.ours.poll(0.05), "the failure waits for the batch before it"
    served.lane.done |= {1, 3}
    assert served.answer() == BatchResult([1], 0.0, 1.0)
    failure = served.answer()
    assert isinstance(failure, Failure) and "cannot be launched" in failure.text and not failure.fatal
    assert served.answer() == BatchResult([3], 0.0, 1.0)


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
