"""A worker launches the next batch before the last is done, and answers in order."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from splitwiser_lab.errors import LaneError
from splitwiser_lab.lanes import worker
from splitwiser_lab.lanes.wire import Failure, Ready, Sender, pack_work, receive_answer
from splitwiser_lab.lanes.worker import Server, serve
from splitwiser_lab.model.batch import GREEDY, Batch, BatchResult, Sequence
from splitwiser_lab.model.graph_shapes import UsualWork


class Slow:
    """A lane of depth 2 whose batches are done when the test says so."""

    depth = 2

    def __init__(self) -> None:
        self.submitted: list[Batch] = []
        self.done: set[int] = set()
        self.fails: set[int] = set()
        self.warm: list[UsualWork] = []

    def warm_up(self, work: UsualWork) -> None:
        if not work.rows:
            raise LaneError("a graph could not be captured")
        self.warm.append(work)

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


def test_a_warm_up_is_answered_like_a_batch_and_may_fail(served: Served) -> None:
    served.ours.send_bytes(pack_work(UsualWork(rows=8)))
    assert served.answer() == Ready(2) and served.lane.warm == [UsualWork(rows=8)]
    served.ours.send_bytes(pack_work(UsualWork()))
    failure = served.answer()
    assert isinstance(failure, Failure) and "could not be captured" in failure.text and not failure.fatal
    served.ask(10)
    served.lane.done.add(1)
    assert served.answer() == BatchResult([1], 0.0, 1.0), "the next batch is none the worse"


@pytest.mark.parametrize("error", [LaneError("with 98 SMs, products come out wrong"), KeyError("no such tensor")])
def test_a_lane_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Where and in which line only if nobody expected it."""

    def build(setup: object) -> None:
        raise error

    monkeypatch.setattr(worker, "_lane", build)
    ours, theirs = Pipe()
    ours.send("the setup")
    serve(theirs)
    failure = receive_answer(ours)
    assert isinstance(failure, Failure) and failure.fatal and str(error) in failure.text
    assert ("Traceback" in failure.text) == isinstance(error, KeyError)
