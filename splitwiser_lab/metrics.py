"""The figures of a run, computed from its timeline and nothing else.

The definitions are those of `vllm bench serve` (vllm/benchmarks/serve.py, `calculate_metrics`), so that
a figure here and a figure there mean the same: only completed requests count, percentiles interpolate
linearly, the standard deviation is that of the population. One thing differs on purpose: where nothing
was measured vLLM writes 0, this module says None.

This module knows no engine and no clock. Times in a timeline are seconds; latencies here are milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, get_args

import numpy as np

from splitwiser_lab.timeline import Phase, RequestRecord, SpanPhase, Timeline


@dataclass(frozen=True, slots=True)
class Distribution:
    """One latency over all its samples, in milliseconds; every figure is None when `count` is 0."""

    mean: float | None
    median: float | None
    std: float | None
    p90: float | None
    p99: float | None
    max: float | None
    count: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Distribution:
        """Summarise samples; percentiles interpolate linearly, `std` divides by the count."""
        if not len(samples_ms):
            return cls(None, None, None, None, None, None, 0)
        values = np.asarray(samples_ms, dtype=np.float64)
        median, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
        return cls(float(values.mean()), median, float(values.std()), p90, p99, float(values.max()), len(values))


@dataclass(frozen=True, slots=True)
class RequestLatency:
    """The latencies of one completed request, in milliseconds.

    A request of a single token has no gaps: its `tpot_ms` and `max_itl_ms` are 0, as in vLLM's goodput.
    """

    id: int
    tokens: int
    ttft_ms: float
    tpot_ms: float
    max_itl_ms: float
    e2el_ms: float

    @classmethod
    def of(cls, request: RequestRecord) -> RequestLatency:
        """Latencies of a completed request with at least one token."""
        first, last, gaps = request.token_times[0], request.token_times[-1], _gaps_ms(request)
        return cls(
            id=request.id,
            tokens=len(request.token_times),
            ttft_ms=(first - request.arrival) * 1e3,
            tpot_ms=(last - first) * 1e3 / len(gaps) if gaps else 0.0,
            max_itl_ms=max(gaps, default=0.0),
            e2el_ms=(last - request.arrival) * 1e3,
        )


@dataclass(frozen=True)
class Metrics:
    """What `vllm bench serve` would report of this run. Build it with `Metrics.of(timeline)`.

    ttft  first token - arrival
    tpot  (last token - first token) / (tokens - 1), requests of more than one token
    itl   gap between two tokens of a request, pooled over all requests
    e2el  last token - arrival

    Latencies, token totals and throughputs (per second) count completed requests only; `duration_s` is
    the whole run's. `failed` is every request that did not complete: `refused`, `errors`, `cancelled` and
    `unfinished` add up to it. A request that stopped before its first token completes without latencies.
    `phase_seconds` is the time in which at least one span of that phase ran, on any lane.
    """

    completed: int
    failed: int
    refused: int
    errors: int
    cancelled: int
    unfinished: int
    completed_share: float | None
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    phase_seconds: dict[SpanPhase, float]
    per_request: tuple[RequestLatency, ...] = field(repr=False)

    @classmethod
    def of(cls, timeline: Timeline) -> Metrics:
        """Compute every figure from the request records and spans of a timeline."""
        done = [request for request in timeline.requests if request.completed]
        reasons = Counter(request.finish_reason for request in timeline.requests)
        each = tuple(RequestLatency.of(request) for request in done if request.token_times)
        duration = timeline.duration
        inputs = sum(request.prompt_tokens for request in done)
        outputs = sum(len(request.token_times) for request in done)
        return cls(
            completed=len(done),
            failed=len(timeline.requests) - len(done),
            refused=reasons["refused"],
            errors=reasons["error"],
            cancelled=reasons["cancelled"],
            unfinished=reasons["unfinished"],
            completed_share=len(done) / len(timeline.requests) if timeline.requests else None,
            duration_s=duration,
            total_input_tokens=inputs,
            total_output_tokens=outputs,
            request_throughput=_per_second(len(done), duration),
            output_throughput=_per_second(outputs, duration),
            total_token_throughput=_per_second(inputs + outputs, duration),
            ttft=Distribution.of([r.ttft_ms for r in each]),
            tpot=Distribution.of([r.tpot_ms for r in each if r.tokens > 1]),
            itl=Distribution.of([gap for request in done for gap in _gaps_ms(request)]),
            e2el=Distribution.of([r.e2el_ms for r in each]),
            phase_seconds={phase: busy_seconds(timeline, phase=phase) for phase in get_args(SpanPhase)},
            per_request=each,
        )

    def goodput(
        self,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        itl_ms: float | None = None,
        e2el_ms: float | None = None,
    ) -> float:
        """Completed requests per second that keep every limit given (a latency equal to its limit keeps it).

        `ttft_ms`, `tpot_ms` and `e2el_ms` are vLLM's goodput. `itl_ms` is ours: it bounds the *longest*
        gap between two tokens of the request, so that one stall is enough to lose it.
        Raises ValueError when no limit is given.
        """
        limits = {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "max_itl_ms": itl_ms, "e2el_ms": e2el_ms}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if not given:
            raise ValueError("goodput needs a limit to judge by: give ttft_ms, tpot_ms, itl_ms or e2el_ms")
        good = sum(all(getattr(r, name) <= limit for name, limit in given.items()) for r in self.per_request)
        return _per_second(good, self.duration_s)

    def to_dict(self) -> dict[str, Any]:
        """Flat and ready for JSON, under the names of `vllm bench serve`; None where nothing was measured."""
        own = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "duration_s")
        figures: dict[str, Any] = {"duration": self.duration_s}
        figures.update((name, value) for name, value in own if isinstance(value, int | float | None))
        for name, distribution in self._latencies():
            for statistic in ("mean", "median", "std", "p90", "p99", "max"):
                figures[f"{statistic}_{name}_ms"] = getattr(distribution, statistic)
        return figures

    def __str__(self) -> str:
        total = self.completed + self.failed
        lines = [
            f"{self.completed} of {total} requests completed in {self.duration_s:.2f} s: "
            f"{self.request_throughput:.2f} requests/s, {self.output_throughput:.1f} output tok/s",
            f"{'ms':<5}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}{'samples':>10}",
        ]
        for name, d in self._latencies():
            cells = (f"{'n/a' if v is None else f'{v:.2f}':>10}" for v in (d.mean, d.median, d.p90, d.p99, d.max))
            lines.append(f"{name.upper():<5}{''.join(cells)}{d.count:>10}")
        return "\n".join(lines)

    def _latencies(self) -> tuple[tuple[str, Distribution], ...]:
        return (("ttft", self.ttft), ("tpot", self.tpot), ("itl", self.itl), ("e2el", self.e2el))


def busy_seconds(timeline: Timeline, lane: str | None = None, phase: SpanPhase | None = None) -> float:
    """Seconds in which at least one span ran; overlapping spans count once.

    `lane` and `phase` keep only the spans that carry exactly that name: a mixed span is neither prefill
    nor decode.
    """
    return sum(end - start for start, end in _union(timeline, lane, phase))


def overlap_seconds(timeline: Timeline) -> float:
    """Seconds in which a prefill span and a decode span ran at once: the co-location itself.

    A mixed span is one batch, not two at once, and adds nothing.
    """
    prefill, decode = _union(timeline, None, "prefill"), _union(timeline, None, "decode")
    seconds, i, j = 0.0, 0, 0
    while i < len(prefill) and j < len(decode):
        seconds += max(0.0, min(prefill[i][1], decode[j][1]) - max(prefill[i][0], decode[j][0]))
        if prefill[i][1] <= decode[j][1]:
            i += 1
        else:
            j += 1
    return seconds


def rate(timeline: Timeline, phase: Phase, start: float, end: float) -> float:
    """Tokens per second of one phase between `start` and `end` (seconds), mixed spans included.

    A span that the window cuts counts pro rata, as if its tokens were spread evenly over its time. An
    instant span counts if it lies in [start, end). Raises ValueError for an unknown phase or empty window.
    """
    if phase not in get_args(Phase):
        raise ValueError(f"a rate is that of 'prefill' or of 'decode', not {phase!r}; mixed spans count in both")
    if not end > start:
        raise ValueError(f"a rate needs a window of positive length, got {start} to {end} s")
    tokens = 0.0
    for span in timeline.spans:
        amount = span.prefill_tokens if phase == "prefill" else span.decode_tokens
        if span.seconds > 0:
            tokens += amount * max(0.0, min(end, span.end) - max(start, span.start)) / span.seconds
        elif start <= span.start < end:
            tokens += amount
    return tokens / (end - start)


def _union(timeline: Timeline, lane: str | None, phase: SpanPhase | None) -> list[tuple[float, float]]:
    """Disjoint intervals, in order, that cover the spans of this lane and phase (None: any)."""
    chosen = ((s.start, s.end) for s in timeline.spans if lane in (None, s.lane) and phase in (None, s.phase))
    union: list[tuple[float, float]] = []
    for start, end in sorted(chosen):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def _gaps_ms(request: RequestRecord) -> list[float]:
    return [(later - earlier) * 1e3 for earlier, later in pairwise(request.token_times)]


def _per_second(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
