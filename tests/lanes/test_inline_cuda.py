"""How the inline lane reads a GPU's clock and waits for it, on a GPU made for the test: events and no device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from splitwiser_lab.errors import LaneError
from splitwiser_lab.lanes import inline
from splitwiser_lab.lanes.base import wait_any
from splitwiser_lab.lanes.inline import DeviceClock, DeviceTicket, InlineLane
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence


class Device:
    """Work queued on one stream; its clock and the host's run at the same pace from different zeros."""

    now = 1000.0  # host seconds
    busy_until = 0.0

    @classmethod
    def work(cls, seconds: float) -> None:
        cls.busy_until = max(cls.busy_until, cls.now) + seconds

    @classmethod
    def sync_to(cls, moment: float) -> None:
        cls.now = max(cls.now, moment)


class Event:
    """Happens when all work queued before it is done."""

    made: ClassVar[list[Event]] = []

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "an event without timing has no time to give"
        self.at: float | None = None
        Event.made.append(self)

    def record(self) -> None:
        self.at = max(Device.busy_until, Device.now)

    def query(self) -> bool:
        assert self.at is not None
        return Device.now >= self.at

    def synchronize(self) -> None:
        assert self.at is not None
        Device.sync_to(self.at)

    def elapsed_time(self, later: Event) -> float:
        assert self.query() and later.query() and self.at is not None and later.at is not None
        return (later.at - self.at) * 1e3


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> type[Device]:
    Device.now, Device.busy_until, Event.made = 1000.0, 0.0, []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Device.sync_to(Device.busy_until))
    monkeypatch.setattr(inline.time, "perf_counter", lambda: Device.now)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: plain(*args, **kwargs))
    return Device


class FakeTransformer:
    """Launches work of a given length and picks the tokens it was told to."""

    def __init__(self, seconds: float, *tokens: int) -> None:
        self.seconds, self.tokens = seconds, tokens
        self.weights = SimpleNamespace(device="cuda")

    def run(self, batch: Batch) -> torch.Tensor:
        Device.work(self.seconds)
        return torch.tensor(self.tokens)


def batch() -> Batch:
    chunk = Sequence([5, 6], 0, [2], None)
    return Batch([Sequence([1], 8, [0, 1], GREEDY)], [chunk, Sequence([7], 0, [3], GREEDY)])


def lane_of(transformer: Any) -> InlineLane:
    return InlineLane("main", transformer)


def test_submit_returns_before_the_work_is_done() -> None:
    ticket = lane_of(FakeTransformer(0.5, 42, 43)).submit(batch())
    assert Device.now == 1000.0
    assert not ticket.done()
    assert ticket.connection() is None
    Device.now = 1000.4
    assert not ticket.done()
    Device.now = 1000.6
    assert ticket.done()


def test_spans_are_on_the_hosts_clock() -> None:
    """Start and end are the device's own, not when the host asked."""
    lane = lane_of(FakeTransformer(0.5, 42, 43))
    Device.now = 1003.0
    Device.work(2.0)  # the stream is still busy with something else
    ticket = lane.submit(batch())
    Device.now = 1009.0
    result = ticket.result()
    assert (result.start, result.end) == (pytest.approx(1005.0), pytest.approx(1005.5))


def test_a_token_for_each_sequence_that_asked() -> None:
    assert lane_of(FakeTransformer(0.5, 42, 43)).submit(batch()).result().tokens == [42, None, 43]


def test_result_waits() -> None:
    ticket = lane_of(FakeTransformer(0.5, 42, 43)).submit(batch())
    ticket.result()
    assert Device.now == 1000.5


def test_the_clock_waits_for_the_device_before_it_is_set() -> None:
    """Else the anchor's host time would be earlier than its event."""
    Device.work(3.0)
    clock = DeviceClock()
    event = Event(enable_timing=True)
    Device.work(1.0)
    event.record()
    event.synchronize()
    assert clock.host_time(event) == pytest.approx(1004.0)


def test_the_clock_is_set_anew_now_and_then() -> None:
    """Single-precision milliseconds lose microseconds after a minute."""
    clock = DeviceClock()
    anchors = len(Event.made)
    Device.now += 19.0
    clock.refresh()
    assert len(Event.made) == anchors
    Device.now += 2.0
    clock.refresh()
    assert len(Event.made) == anchors + 1
    event = Event(enable_timing=True)
    event.record()
    assert clock.host_time(event) == pytest.approx(1021.0)


def test_a_ticket_made_before_the_clock_was_set_anew_has_the_right_times() -> None:
    clock = DeviceClock()
    old = DeviceTicket(FakeTransformer(0.25, 1, 2), batch(), clock)  # type: ignore[arg-type]
    Device.now += 30.0
    DeviceTicket(FakeTransformer(0.25, 1, 2), batch(), clock)  # type: ignore[arg-type]
    result = old.result()
    assert (result.start, result.end) == (pytest.approx(1000.0), pytest.approx(1000.25))


def test_a_launch_that_fails_is_the_lanes_error() -> None:
    class OutOfMemory(FakeTransformer):
        def run(self, batch: Batch) -> torch.Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(LaneError, match="lane 'main': a batch failed: CUDA out of memory"):
        lane_of(OutOfMemory(0.0)).submit(batch())


def test_waiting_asks_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to select on: time passes between two looks."""
    ticket = lane_of(FakeTransformer(0.5, 42, 43)).submit(batch())

    def sleep(seconds: float) -> None:
        Device.now += max(seconds, 0.01)

    monkeypatch.setattr("splitwiser_lab.lanes.base.time", SimpleNamespace(sleep=sleep, perf_counter=lambda: Device.now))
    wait_any([ticket])
    assert ticket.done() and Device.now < 1000.6
    later = lane_of(FakeTransformer(5.0, 42, 43)).submit(batch())
    wait_any([later], timeout=1.0)
    assert not later.done() and Device.now < 1002.0
