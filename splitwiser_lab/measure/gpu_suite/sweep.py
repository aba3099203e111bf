"""Serving at rising rates: Azure-conversation requests arrive on their own clock, in every mode by turns.

Rates are parts of what `sequential` gets done when all requests wait at once. Goodput counts requests that
keep both limits of a chat: time to the first token, and the 99th percentile of the gaps between their tokens.
Rounds are interleaved: every mode at every rate, then all of it again with other requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np

from splitwiser_lab.engine.result import Result
from splitwiser_lab.measure.gpu_suite.job import Job, Row, split_modes, summary
from splitwiser_lab.measure.gpu_suite.plan import ChatLimits
from splitwiser_lab.measure.gpu_suite.token_gaps import LOADING_SECONDS, TOKENS_SECONDS, Differences, add_token_rows
from splitwiser_lab.measure.mode_spec import ModeSpec
from splitwiser_lab.measure.monitor import Monitor
from splitwiser_lab.measure.record import file_name
from splitwiser_lab.measure.recording import Recording
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.timeline import RequestRecord, Timeline

_LEAST_REQUESTS = 4
_REFERENCE = "sequential"
_OTHER_ITL_MS = (10.0, 20.0, 50.0, 100.0)  # goodput under these too, so that nobody has to trust our choice
_FIGURES = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "max_itl_ms")
_RATES = ("request_throughput", "output_throughput", "completed", "failed", "duration")


@dataclass
class _Cell:
    """All runs of one mode at one rate."""

    workload: Workload
    results: list[Result] = field(default_factory=list)
    identical: list[float] = field(default_factory=list)  # share of requests whose tokens equal sequential's


def sweep(job: Job) -> None:
    """Measure the capacity (unless it is given), then every rate in every mode, round by round until time is over."""
    capacity = _capacity(job) if job.capacity is None else job.capacity
    sweep = _Sweep(job, _modes(job), capacity)
    with Monitor(job.device) as monitor:
        going = True
        for number in range(job.repeats):
            for fraction in job.plan.sweep_fractions:
                going = going and sweep.rate(number, fraction, monitor)
            if number == 0:  # before a second round, as no figure counts without them
                add_token_rows(job, sweep.differences)


def _modes(job: Job) -> list[str]:
    """Those that the job names, else all of this machine; the first must be sequential, which all are held against."""
    if job.modes:
        return list(dict.fromkeys([_REFERENCE, *job.modes]))
    modes, missing = split_modes(job.engine, job.plan.splits[1:2] or job.plan.splits)
    for mode, why in missing.items():
        job.skip(mode, why)
    return [f"auto:itl_limit_ms={round(job.limits.itl_ms)}" if mode == "auto" else mode for mode in modes]


class _Sweep:
    """What was measured so far, and the modes that still work."""

    def __init__(self, job: Job, modes: list[str], capacity: float) -> None:
        self._job, self._going, self._capacity = job, modes, capacity
        self._cells: dict[tuple[float, str], _Cell] = {}
        self._warm: set[str] = set()
        self._longest = 0.0
        self.differences: dict[str, Differences] = {}
        # A quarter of what is left at most: with less time there are fewer texts to read.
        self._kept_for_tokens = min(LOADING_SECONDS + TOKENS_SECONDS * len(modes), job.seconds_left / 4)

    def rate(self, number: int, fraction: float, monitor: Monitor) -> bool:
        """One round at one rate in every mode. False when the time is over."""
        job, rate = self._job, self._capacity * fraction
        count = max(_LEAST_REQUESTS, round(rate * job.plan.sweep_seconds))
        work = Workload.azure("conv", rate=rate, requests=count, seed=number).scaled(job.plan.sweep_scale)
        reference: list[list[int]] | None = None
        kept = 0.0 if number else self._kept_for_tokens
        for mode in self._in_turn(number):
            what = f"{fraction:.0%} of capacity, {mode}, round {number + 1}"
            if not job.time_for(f"{what}, and all after it", self._longest + kept):
                return False
            job.report(f"{job.shape}: {what}")
            before = len(job.left_out)
            with job.trying(f"{mode} in the sweep"):
                result = self._serve(mode, work)
                if mode == _REFERENCE:
                    reference = result.tokens
                cell = self._cells.setdefault((fraction, mode), _Cell(work))
                cell.results.append(result)
                if reference is not None:
                    noted = self.differences.setdefault(mode, Differences())
                    cell.identical.append(noted.compare(result.requests, reference))
                _add_or_update(job, fraction, rate, mode, cell)
            if len(job.left_out) > before:
                self._going.remove(mode)
            elif number == 0:
                with job.trying(f"the recording of {mode}"):
                    _record(job, fraction, mode, cell, monitor)
        return True

    def _in_turn(self, number: int) -> list[str]:
        """The modes that still work: sequential first, all are held against it; each of the others begins once."""
        first, others = self._going[:1], self._going[1:]
        turn = number % max(len(others), 1)
        return [*first, *others[turn:], *others[:turn]]

    def _serve(self, mode: str, work: Workload) -> Result:
        engine = self._job.engine
        ModeSpec.parse(mode).set(engine)
        if mode not in self._warm:
            engine.serve(work.head(max(_LEAST_REQUESTS, len(work) // 2)))
            self._warm.add(mode)
        result = engine.serve(work)
        self._longest = max(self._longest, 1.2 * result.timeline.duration)
        return result


def _capacity(job: Job) -> float:
    """Requests per second that `sequential` completes when all are there at once: the mean of two runs, after one."""
    job.report(f"{job.shape}: measuring the capacity of sequential")
    job.engine.set_mode("sequential")
    drawn = Workload.azure("conv", requests=job.plan.capacity_requests).scaled(job.plan.sweep_scale)
    at_once = Workload("azure conv, all at once", tuple(_at_zero(drawn)), seed=drawn.seed)
    job.engine.serve(at_once.head(max(1, len(at_once) // 4)))
    rates = [job.engine.serve(at_once).metrics.request_throughput for _ in range(2)]
    job.add(part="capacity", mode="sequential", requests=len(at_once), request_throughput=summary(rates))
    return fmean(rates)


def _at_zero(workload: Workload) -> Any:
    return (replace(arrival, arrival_s=0.0) for arrival in workload.arrivals)


def _add_or_update(job: Job, fraction: float, rate: float, mode: str, cell: _Cell) -> None:
    """The row of a mode at a rate: medians over the rounds so far."""
    metrics = [result.metrics.to_dict() for result in cell.results]
    timelines = [result.timeline for result in cell.results]
    row: Row = {"part": "rate", "fraction": fraction, "rate": rate, "mode": mode, "requests": len(cell.workload)}
    for name in (*_RATES, *_FIGURES):
        values = [m[name] for m in metrics if m[name] is not None]
        row[name] = summary(values) if values else None
    row["goodput"] = summary([goodput(timeline, job.limits) for timeline in timelines])
    for itl in _OTHER_ITL_MS:
        others = [goodput(timeline, ChatLimits(job.limits.ttft_ms, itl)) for timeline in timelines]
        row[f"goodput_itl_{itl:g}ms"] = summary(others)
    row["good_share"] = summary([good_share(timeline, job.limits) for timeline in timelines])
    row["max_idle_ms"] = summary([1e3 * longest_idle(timeline) for timeline in timelines])
    row["tokens_as_sequential"] = min(cell.identical, default=None)
    job.rows[:] = [r for r in job.rows if (r.get("fraction"), r.get("mode")) != (fraction, mode) or r["part"] != "rate"]
    job.add(**row)


def goodput(timeline: Timeline, limits: ChatLimits) -> float:
    """Completed requests per second that keep both limits; a request of one token has no gap to judge.

    As `vllm bench serve` has it, of the whole run: also of the time in which the last answers end. So even where
    every request is good it stays below the rate of arrivals.
    """
    return _good(timeline, limits) / timeline.duration if timeline.duration else 0.0


def good_share(timeline: Timeline, limits: ChatLimits) -> float:
    """Those requests' part of all: 1 where every request was served well."""
    return _good(timeline, limits) / max(len(timeline.requests), 1)


def longest_idle(timeline: Timeline) -> float:
    """Longest time, in seconds, in which no lane had a batch although a request was there: the host's doing.

    As where a kernel is compiled or a graph captured that the warm-up did not expect. It is no part of a mechanism.
    """
    end, longest = 0.0, 0.0
    for start, stop in sorted((span.start, span.end) for span in timeline.spans):
        if start > end:
            there = (r for r in timeline.requests if r.finished is None or r.finished >= start)
            longest = max(longest, *(start - max(end, r.arrival) for r in there), 0.0)
        end = max(end, stop)
    return longest


def _good(timeline: Timeline, limits: ChatLimits) -> int:
    return sum(_keeps(request, limits) for request in timeline.requests if request.completed and request.token_times)


def _keeps(request: RequestRecord, limits: ChatLimits) -> bool:
    ttft = (request.token_times[0] - request.arrival) * 1e3
    gaps = [(later - earlier) * 1e3 for earlier, later in pairwise(request.token_times)]
    return ttft <= limits.ttft_ms and (not gaps or float(np.percentile(gaps, 99)) <= limits.itl_ms)


def _record(job: Job, fraction: float, mode: str, cell: _Cell, monitor: Monitor) -> None:
    """Write the run as a recording, at the plan's first rate for every mode."""
    if job.record is None or fraction != job.plan.sweep_fractions[0]:
        return
    against = "sequential in the same run, as far as it ran first"
    recording = Recording.of(
        cell.results[0],
        job.engine,
        cell.workload,
        tokens_identical=bool(cell.identical) and cell.identical[0] == 1.0,
        tokens_against=against,
        monitor=monitor,
        origin=job.origin,
    )
    path = recording.save(job.record / file_name(recording))
    job.report(f"recorded {path.name}, {path.stat().st_size / 1e3:.0f} kB")
