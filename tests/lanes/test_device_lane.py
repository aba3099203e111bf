"""How a GPU lane reads a GPU's clock and waits for it, on a GPU made for the test: events and no device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from splitwiser_lab.errors import HardwareError, LaneError
from splitwiser_lab.lanes import device as device_module
from splitwiser_lab.lanes.base import wait_any
from splitwiser_lab.lanes.device import DeviceClock, DeviceLane, DeviceTicket
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence


class Stream:
    """Work queued in order."""

    def __init__(self, device: Any = "cuda") -> None:
        self.device, self.busy_until = device, 0.0

    def synchronize(self) -> None:
        Device.sync_to(self.busy_until)


class Device:
    """The host's clock, and the stream under which work is launched."""

    now = 1000.0  # host seconds
    current = Stream()
    failed = False

    @classmethod
    def work(cls, seconds: float) -> None:
        cls.current.busy_until = max(cls.current.busy_until, cls.now) + seconds

    @classmethod
    def sync_to(cls, moment: float) -> None:
        cls.now = max(cls.now, moment)

    @classmethod
    @contextlib.contextmanager
    def under(cls, stream: Stream) -> Iterator[None]:
        before, cls.current = cls.current, stream
        yield
        cls.current = before


class Event:
    """Happens when all work queued before it is done."""

    made: ClassVar[list[Event]] = []

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "an event without timing has no time to give"
        self.at: float | None = None
        Event.made.append(self)

    def record(self, stream: Stream | None = None) -> None:
        self.at = max((stream or Device.current).busy_until, Device.now)

    def query(self) -> bool:
        assert self.at is not None
        if Device.failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Device.now >= self.at

    def synchronize(self) -> None:
        assert self.at is not None
        self.query()
        Device.sync_to(self.at)

    def elapsed_time(self, later: Event) -> float:
        assert self.query() and later.query() and self.at is not None and later.at is not None
        return (later.at - self.at) * 1e3


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> type[Device]:
    Device.now, Device.current, Device.failed, Event.made = 1000.0, Stream(), False, []
    for name, fake in {"Event": Event, "Stream": Stream, "stream": Device.under}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    default = Stream()
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Device.current)
    monkeypatch.setattr(device_module.time, "perf_counter", lambda: Device.now)
    plain = torch.empty
    monkeypatch.setattr(device_module, "runner_for", lambda transformer, multiprocessors: transformer)
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: plain(*args, **kwargs))
    return Device


class FakeTransformer:
    """Launches work of a given length and picks the tokens it was told to."""

    def __init__(self, seconds: float, *tokens: int) -> None:
        self.seconds, self.tokens = seconds, tokens
        self.weights = SimpleNamespace(device="cuda")

    def run(self, batch: Batch, on_launch: Callable[[], None]) -> torch.Tensor:
        on_launch()
        Device.work(self.seconds)
        return torch.tensor(self.tokens)


def batch() -> Batch:
    chunk = Sequence([5, 6], 0, [2], None)
    return Batch([Sequence([1], 8, [0, 1], GREEDY)], [chunk, Sequence([7], 0, [3], GREEDY)])


def lane_of(transformer: Any) -> DeviceLane:
    return DeviceLane("main", transformer, Stream())  # type: ignore[arg-type]


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
    lane.stream.busy_until = 1005.0  # the stream is still busy with something else
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


def test_setting_the_clock_waits_for_no_batch() -> None:
    Device.work(3.0)
    clock = DeviceClock(torch.device("cuda"))
    assert Device.now == 1000.0
    event = Event(enable_timing=True)
    event.record()
    event.synchronize()
    assert clock.host_time(event) == pytest.approx(1003.0)


def test_what_other_streams_wrote_is_there_before_the_first_batch() -> None:
    Device.work(3.0)  # say, the weights
    lane = lane_of(FakeTransformer(0.5, 42, 43))
    assert lane.submit(batch()).result().start == pytest.approx(1003.0)
    lane.close()
    lane.close()


def test_closing_waits_for_what_was_launched() -> None:
    lane = lane_of(FakeTransformer(0.5, 42, 43))
    lane.submit(batch())
    lane.close()
    assert Device.now == 1000.5


def test_two_lanes_run_at_the_same_time() -> None:
    lanes = [lane_of(FakeTransformer(seconds, 42, 43)) for seconds in (0.5, 0.2)]
    long, short = [lane.submit(batch()) for lane in lanes]
    Device.now = 1000.3
    assert short.done() and not long.done()
    assert long.result().start == short.result().start == pytest.approx(1000.0)


def test_a_kernel_that_fails_is_the_lanes_error() -> None:
    ticket = lane_of(FakeTransformer(0.5, 42, 43)).submit(batch())
    Device.failed = True
    assert ticket.done(), "or the engine would wait for ever"
    with pytest.raises(LaneError, match=r"lane 'main': a batch failed on the device: .*illegal.*restart"):
        ticket.result()


def test_the_clock_is_set_anew_now_and_then() -> None:
    """Single-precision milliseconds lose microseconds after a minute."""
    clock = DeviceClock(torch.device("cuda"))
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
    clock = DeviceClock(torch.device("cuda"))
    old = DeviceTicket("main", FakeTransformer(0.25, 1, 2), batch(), clock)  # type: ignore[arg-type]
    Device.now += 30.0
    DeviceTicket("main", FakeTransformer(0.25, 1, 2), batch(), clock)  # type: ignore[arg-type]
    result = old.result()
    assert (result.start, result.end) == (pytest.approx(1000.0), pytest.approx(1000.25))


def test_a_launch_that_fails_is_the_lanes_error() -> None:
    class OutOfMemory(FakeTransformer):
        def run(self, batch: Batch, on_launch: Callable[[], None]) -> torch.Tensor:
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


def test_a_part_of_the_gpu_that_multiplies_wrongly_takes_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each lane, on its own stream; a lane with all of the GPU is trusted."""
    asked = []

    def check(matrices: list[str], where: str, advice: str) -> None:
        asked.append((matrices, where, Device.current))
        if "98" in where:
            raise HardwareError(f"{where}, 3 of 9 products come out wrong. {advice}")

    monkeypatch.setattr(device_module, "check_products", check)
    model = FakeTransformer(0.5, 42, 43)
    model.weights.multiplied = lambda: ["all of them"]
    lane_of(model).submit(batch())
    assert not asked
    right = DeviceLane("main", model, Stream(), part="with 66 SMs")  # type: ignore[arg-type]
    for _ in range(2):
        right.submit(batch())
    assert asked == [(["all of them"], "with 66 SMs", right.stream)]
    wrong = DeviceLane("prefill", model, Stream(), part="with 98 SMs")  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(LaneError, match=r"^lane 'prefill': with 98 SMs, 3 of 9 .* wrong\. Choose another"):
            wrong.submit(batch())
    with pytest.raises(LaneError, match="wrong"):
        wrong.start()
