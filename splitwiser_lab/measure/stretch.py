"""The figures of one stretch of a run, and the overlap gain of work as it came.

A live view compares the stretch before a flip with the one after it. The gain here is that of `overlap`, for
any mixture of batches: the time that the same batches take when each has the machine to itself, over the time in
which anything ran. Taking turns gives 1, perfect overlap 2. This module knows no engine and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from splitwiser_lab.metrics import busy_seconds
from splitwiser_lab.timeline import RequestRecord, Span, Timeline

ALONE_MODE = "sequential"  # its batches run one at a time, with the whole machine


@dataclass(frozen=True)
class Alone:
    """What batches take by themselves: prefill a time per token, decode a time per step and one per sequence."""

    prefill_s_per_token: float
    decode_s_per_step: float
    decode_s_per_sequence: float

    def seconds(self, span: Span) -> float:
        """How long the work of this batch takes alone, phase after phase, in seconds."""
        decode = self.decode_s_per_step + self.decode_s_per_sequence * span.decode_tokens if span.decode_tokens else 0.0
        return self.prefill_s_per_token * span.prefill_tokens + decode

    def request_seconds(self, prompt_tokens: int, new_tokens: int, batch: int = 4) -> float:
        """The machine's time for one request that decodes in company of `batch` in all, in seconds."""
        step = self.decode_s_per_step / batch + self.decode_s_per_sequence
        return self.prefill_s_per_token * prompt_tokens + step * new_tokens

    @classmethod
    def fit(cls, spans: Iterable[Span]) -> Alone | None:
        """From the spans of `sequential` among these; None unless both phases are there.

        Medians per batch size, so that a hiccup does not count; then a straight line that falls nowhere.
        """
        own = [span for span in spans if span.mode == ALONE_MODE and span.seconds > 0]
        prefill = [span.seconds / span.prefill_tokens for span in own if span.phase == "prefill"]
        steps: dict[int, list[float]] = {}
        for span in own:
            if span.phase == "decode":
                steps.setdefault(span.decode_tokens, []).append(span.seconds)
        if not prefill or not steps:
            return None
        sizes, times = list(steps), [median(seconds) for seconds in steps.values()]
        slope, base = (
            np.polyfit(sizes, times, 1, w=[len(s) ** 0.5 for s in steps.values()]) if len(sizes) > 1 else (0, 0)
        )
        if slope <= 0 or base <= 0:
            slope, base = 0.0, float(np.average(times, weights=[len(s) for s in steps.values()]))
        return cls(median(prefill), float(base), float(slope))


@dataclass(frozen=True)
class Stretch:
    """What one stretch of time was like for the requests in it; None where nothing was measured.

    `ttft_ms`, `tpot_ms` and `itl_ms` are medians: of first tokens, of requests that completed, and of gaps whose
    later token came in it. `output_tokens_per_s` counts every token that came.
    """

    label: str
    start: float
    end: float
    completed: int
    ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: float | None
    p99_itl_ms: float | None
    output_tokens_per_s: float
    overlap_gain: float | None

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.end - self.start

    @classmethod
    def of(cls, timeline: Timeline, label: str, start: float, end: float, alone: Alone | None = None) -> Stretch:
        """The figures between `start` and `end`, in seconds on the timeline's clock. ValueError if it is empty."""
        if not end > start:
            raise ValueError(f"a stretch needs a positive length, got {start} to {end} s")
        requests = timeline.requests
        first = [
            1e3 * (r.token_times[0] - r.arrival)
            for r in requests
            if r.token_times and _in(r.token_times[0], start, end)
        ]
        done = [r for r in requests if r.completed and r.token_times and _in(r.token_times[-1], start, end)]
        spread = [
            (r.token_times[-1] - r.token_times[0]) / (len(r.token_times) - 1) for r in done if len(r.token_times) > 1
        ]
        _, gaps = gaps_ms(requests, start, end)
        tokens = sum(_in(time, start, end) for r in requests for time in r.token_times)
        return cls(
            label=label,
            start=start,
            end=end,
            completed=len(done),
            ttft_ms=median(first) if first else None,
            tpot_ms=1e3 * median(spread) if spread else None,
            itl_ms=float(np.median(gaps)) if gaps.size else None,
            p99_itl_ms=float(np.percentile(gaps, 99)) if gaps.size else None,
            output_tokens_per_s=tokens / (end - start),
            overlap_gain=gain(timeline, start, end, alone) if alone else None,
        )


def gaps_ms(
    requests: Sequence[RequestRecord], start: float, end: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Every gap between two tokens of a request (ms) whose later token came in [start, end), and when; by time."""
    times, gaps = [], []
    for request in requests:
        if len(request.token_times) > 1 and request.token_times[-1] >= start:
            moments = np.asarray(request.token_times)
            times.append(moments[1:])
            gaps.append(np.diff(moments) * 1e3)
    if not times:
        return np.empty(0), np.empty(0)
    at, gap = np.concatenate(times), np.concatenate(gaps)
    inside = (at >= start) & (at < end)
    order = np.argsort(at[inside], kind="stable")
    return at[inside][order], gap[inside][order]


def gain(timeline: Timeline, start: float, end: float, alone: Alone) -> float | None:
    """The overlap gain of the batches that ended in [start, end); None when there were none."""
    spans = tuple(span for span in timeline.spans if _in(span.end, start, end))
    busy = busy_seconds(Timeline(spans, ()))
    return sum(map(alone.seconds, spans)) / busy if busy else None


def _in(moment: float, start: float, end: float) -> bool:
    return start <= moment < end
