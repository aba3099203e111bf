"""A device on a clock of its own: the core, its scheduler and the governor are real, lanes and time are not.

A batch takes the seconds that it takes alone; while the other lane works, too, or on a part of the device, it goes
on at the lane's share of that speed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from splitwiser_lab.engine import auto, core
from splitwiser_lab.engine.auto import Governor
from splitwiser_lab.engine.controller import Candidate, Line, Shares
from splitwiser_lab.engine.core import Core
from splitwiser_lab.engine.modes import MODES
from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request, Sampling
from splitwiser_lab.engine.scheduler import Limits
from splitwiser_lab.engine.station import ModeSwitch, Station
from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.timeline import ModeChange

_LAUNCH_SECONDS = 1e-4  # of the host, for each batch


@dataclass
class Job:
    """A batch on a lane: seconds alone that are left of it."""

    left: float
    start: float | None = None
    end: float | None = None


@dataclass
class Device:
    """Times alone, and the clock. Stands in for the module `time`, too."""

    prefill: Line
    decode: Line
    now: float = 0.0
    lanes: list[SimulatedLane] = field(default_factory=list)

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.until(lambda: False, self.now + seconds)

    def until(self, done: Callable[[], bool], deadline: float = float("inf")) -> None:
        """Let time pass until `done` or the deadline."""
        while not done() and self.now < deadline:
            busy = [lane for lane in self.lanes if lane.jobs]
            assert busy or deadline < float("inf"), "nothing is under way that could end"
            speeds = [lane.beside if len(busy) > 1 else lane.alone for lane in busy]
            ends = [lane.jobs[0].left / speed for lane, speed in zip(busy, speeds, strict=True)]
            passed = min([*ends, deadline - self.now])
            for lane, speed, end in zip(busy, speeds, ends, strict=True):
                job = lane.jobs[0]
                job.start = self.now if job.start is None else job.start
                job.left -= passed * speed
                if end <= passed:
                    job.end = self.now + passed
                    lane.jobs.popleft()
            self.now += passed


class SimulatedLane:
    """Speeds are parts of the whole device's: while nothing runs beside, and while something does."""

    depth = 2

    def __init__(self, device: Device, name: str, alone: float = 1.0, beside: float = 1.0) -> None:
        self.device, self.name, self.alone, self.beside = device, name, alone, beside
        self.cores: list[int] = []
        self.jobs: deque[Job] = deque()
        device.lanes.append(self)

    def start(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, batch: Batch) -> SimulatedTicket:
        device = self.device
        seconds = device.prefill.each * batch.prefill_tokens
        seconds += device.decode.at(len(batch.decode)) if batch.decode else device.prefill.fixed
        self.jobs.append(job := Job(seconds))
        device.now += _LAUNCH_SECONDS
        return SimulatedTicket(device, job, [None if s.sampling is None else 7 for s in batch.sequences])


class SimulatedTicket:
    def __init__(self, device: Device, job: Job, tokens: list[int | None]) -> None:
        self._device, self._job, self._tokens = device, job, tokens

    def done(self) -> bool:
        return self._job.end is not None

    def result(self) -> BatchResult:
        self._device.until(self.done)
        assert self._job.start is not None and self._job.end is not None
        return BatchResult(self._tokens, self._job.start, self._job.end)

    def connection(self) -> None:
        return None


@dataclass(frozen=True)
class Arrival:
    at: float
    prompt: int
    output: int


@dataclass
class Run:
    """What came of it. `seconds` by label of what the governor ran; all times in ms."""

    requests: list[Request]
    seconds: dict[str, float]
    governor: Governor
    ended: float

    @property
    def gaps(self) -> list[float]:
        return [(b - a) * 1e3 for r in self.requests for a, b in pairwise(r.token_times)]

    @property
    def itl_p99(self) -> float:
        return float(np.percentile(self.gaps, 99))

    def within(self, limit_ms: float) -> float:
        """Part of the requests whose 99th percentile of gaps keeps the limit."""
        each = [[b - a for a, b in pairwise(r.token_times)] for r in self.requests]
        return float(np.mean([not gaps or np.percentile(gaps, 99) * 1e3 <= limit_ms for gaps in each]))

    @property
    def itl_max(self) -> float:
        return max(self.gaps)

    @property
    def ttft_p50(self) -> float:
        return float(np.median([r.token_times[0] - r.arrival for r in self.requests])) * 1e3


Truth = dict[str, Shares]  # what really is left of both phases, by label; a split that divides has it alone, too


def simulate(
    patch: pytest.MonkeyPatch,
    device: Device,
    truth: Truth,
    candidates: Sequence[Candidate],
    arrivals: Sequence[Arrival],
    limit_ms: float | None = None,
) -> Run:
    """Serve `arrivals` with a governor over `candidates`; a single candidate is what runs all the time."""

    def wait_any(tickets: list[SimulatedTicket], timeout: float | None = None) -> None:
        deadline = float("inf") if timeout is None else device.now + timeout
        device.until(lambda: any(ticket.done() for ticket in tickets), deadline)

    for module in (core, auto):
        patch.setattr(module, "time", device)
    patch.setattr(core, "wait_any", wait_any)
    limits = Limits(256, 8192, 512, decode_step=32)
    engine = Core(PageAllocator(20_000, 32), limits, lambda r: None if r.wants_more else "length")
    main = SimulatedLane(device, "main")
    switches = [(one, _switch(device, main, one, truth, limits)) for one in candidates]
    governor = Governor(engine, switches, {}, limit_ms)
    engine.switch(governor.start if len(candidates) > 1 else switches[0][1])
    requests = [Request(number, [5] * a.prompt, Sampling(a.output), a.at) for number, a in enumerate(arrivals)]
    due = deque(requests)

    def admit() -> float | None:
        while due and due[0].arrival <= device.now:
            engine.add(due.popleft())
        return max(0.0, due[0].arrival - device.now) if due else None

    engine.drive(lambda: not due and all(request.done for request in requests), admit)
    changes = [*engine.modes, ModeChange(device.now, "end")]
    seconds: dict[str, float] = {}
    for change, following in pairwise(changes):
        seconds[change.runs] = seconds.get(change.runs, 0.0) + following.time - change.time
    return Run(requests, seconds, governor, device.now)


def _switch(device: Device, main: SimulatedLane, one: Candidate, truth: Truth, limits: Limits) -> ModeSwitch:
    stations = []
    for name, (_, policy) in MODES[one.mode].lanes.items():
        if one.kind != "split":
            stations.append(Station(main, policy))
            continue
        left = truth[one.label]
        share = left.prefill if name == "prefill" else left.decode
        stations.append(Station(SimulatedLane(device, name, share if one.divides else 1.0, share), policy))
    asked = limits.with_options(one.options)
    return ModeSwitch(ModeChange(0.0, "auto", {}, one.label), stations, asked, {})
