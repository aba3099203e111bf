"""From a frame to the points that are plotted: few enough to send several times a second, none that hides a stall.

Everything here is pure. x is in seconds on the view's clock; no series has more than `MOST_POINTS` points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from splitwiser_lab.lab.dashboard.frame import Frame, Part
from splitwiser_lab.lab.thinning import Bar, thinned
from splitwiser_lab.measure.stretch import gaps_ms
from splitwiser_lab.timeline import Phase, Span

MOST_POINTS = 300
_BINS = 80  # of tokens per second over the window
_P99_POINTS, _P99_SECONDS = 60, 3.0  # the p99 line looks back so far
_BARS, _ZOOM_SPANS = 240, 120  # of the Gantt: bars at most, and batches that it tries to show
_ZOOMS = tuple(factor * 10.0**power for power in range(-3, 2) for factor in (1, 2, 5))  # seconds

Points = tuple[list[float | None], list[float | None]]


def hardware(frame: Frame, key: str) -> Points:
    """One metric of the monitor; a gap where a flip switches to another recording's readings."""
    parts = [
        [(r.time, r.values.get(key)) for r in part.readings if _shown(frame, part, r.time)] for part in frame.parts
    ]
    return _joined(frame, [[(t, v) for t, v in points if v is not None] for points in parts])


def kv_use(frame: Frame) -> Points:
    """Share of the KV pool in use, in per cent."""
    parts = [[(t, 100 * share) for t, share in part.kv if _shown(frame, part, t)] for part in frame.parts]
    return _joined(frame, parts)


def rate(frame: Frame, phase: Phase) -> Points:
    """Tokens per second of one phase, in bins of the window; a batch counts evenly over its time."""
    width = frame.window / _BINS
    first, last = math.ceil(frame.start / width), math.floor(frame.now / width)
    edges: NDArray[np.float64] = width * np.arange(first, last + 1, dtype=np.float64)
    if len(edges) < 2:
        return [], []
    total = np.zeros(len(edges))
    for part in frame.parts:
        total += _tokens_until(_clipped(frame, part), phase, edges)
    return _rounded((edges[1:] + edges[:-1]) / 2), _rounded(np.diff(total) / width)


def gaps(frame: Frame) -> Points:
    """The gap before each recent token (ms). Of too many, each slot of time keeps its longest and its median."""
    at, gap = _gaps(frame, frame.start)
    if len(at) > MOST_POINTS:
        slots = np.array_split(np.arange(len(at)), MOST_POINTS // 2)
        middle = [slot[np.argsort(gap[slot])[len(slot) // 2]] for slot in slots]
        kept = np.unique([*middle, *(slot[np.argmax(gap[slot])] for slot in slots)])
        at, gap = at[kept], gap[kept]
    return _rounded(at), _rounded(gap)


def p99(frame: Frame) -> Points:
    """The 99th percentile of the gaps (ms) of the three seconds before each moment."""
    at, gap = _gaps(frame, frame.start - _P99_SECONDS)
    moments = np.linspace(frame.start, frame.now, _P99_POINTS)
    low, high = np.searchsorted(at, moments - _P99_SECONDS), np.searchsorted(at, moments, side="right")
    found = [float(np.percentile(gap[a:b], 99)) if b > a else None for a, b in zip(low, high, strict=True)]
    return _rounded(moments), [None if value is None else _short(value) for value in found]


def zoom(frame: Frame) -> float:
    """How many seconds of lanes can be told apart: a round number, at most the window."""
    ends = sorted(
        span.end for part in frame.parts for span in part.timeline.spans if frame.start < span.end <= frame.now
    )
    most = frame.window / 2
    if len(ends) <= _ZOOM_SPANS:
        return most
    fitting = frame.now - ends[-_ZOOM_SPANS]
    return min((z for z in _ZOOMS if z >= fitting), default=most) if fitting < most else most


def bars(frame: Frame, seconds: float) -> tuple[list[Bar], list[tuple[float, str]]]:
    """Bars of the lanes over the last `seconds`, and hand-offs as (moment, lane-less label)."""
    since = max(frame.start, frame.now - seconds)
    spans = [span for part in frame.parts for span in _clipped(frame, part) if span.end > since]
    drawn, _ = thinned([replace(s, start=max(s.start, since)) for s in spans], _BARS, seconds / 900)
    handed = [
        (request.hand_off, f"request {request.id}: hand-off after {request.prompt_tokens} prompt tokens")
        for part in frame.parts
        for request in part.timeline.requests
        if request.hand_off is not None and request.hand_off >= since and _shown(frame, part, request.hand_off)
    ]
    return drawn, handed[-MOST_POINTS // 2 :]


def _shown(frame: Frame, part: Part, moment: float) -> bool:
    return max(frame.start, part.start) <= moment <= min(part.end, frame.now)


def _clipped(frame: Frame, part: Part) -> list[Span]:
    """The part's batches in the window, cut where the part begins or ends, tokens in proportion of what is left."""
    clipped = []
    for span in part.timeline.spans:
        start, end = max(span.start, part.start), min(span.end, part.end, frame.now)
        if end > start and end > frame.start:
            clipped.append(span if (start, end) == (span.start, span.end) else _cut(span, start, end))
    return clipped


def _cut(span: Span, start: float, end: float) -> Span:
    share = (end - start) / span.seconds
    prefill, decode = round(span.prefill_tokens * share), round(span.decode_tokens * share)
    return replace(span, start=start, end=end, prefill_tokens=prefill, decode_tokens=decode)


def _tokens_until(spans: Sequence[Span], phase: Phase, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens of one phase that were computed before each of `edges`, `[edges]`."""
    counts = np.array([s.prefill_tokens if phase == "prefill" else s.decode_tokens for s in spans], float)
    start, end = (np.array([getattr(s, side) for s in spans], float) for side in ("start", "end"))
    if not counts.any():
        return np.zeros(len(edges))
    # Tokens come evenly over a batch's time: add up where those ramps begin and end, instead of [edges, spans].
    moments, slopes = np.concatenate([start, end]), np.concatenate([counts, -counts]) / np.tile(end - start, 2)
    order = np.argsort(moments, kind="stable")
    moments, speed = moments[order], np.cumsum(slopes[order])
    done = np.concatenate([[0.0], np.cumsum(speed[:-1] * np.diff(moments))])
    return np.asarray(np.interp(edges, moments, done), np.float64)


def _gaps(frame: Frame, since: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    each = [
        gaps_ms(part.timeline.requests, max(since, part.start), min(part.end, frame.now) + 1e-9) for part in frame.parts
    ]
    if not each:
        return np.empty(0), np.empty(0)
    return np.concatenate([at for at, _ in each]), np.concatenate([gap for _, gap in each])


def _joined(frame: Frame, parts: list[list[tuple[float, float]]]) -> Points:
    """The parts one after the other; between recordings a gap, because those readings do not belong together."""
    most = MOST_POINTS // max(1, len(parts)) - 1
    x: list[float | None] = []
    y: list[float | None] = []
    for points in parts:
        if points and x and frame.recorded:
            x.append(points[0][0])
            y.append(None)
        kept = points[:: -(-len(points) // most)] if points else []
        x += _rounded(np.array([t for t, _ in kept]))
        y += _rounded(np.array([v for _, v in kept]))
    return x, y


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [_short(value) for value in values]


def _short(value: float) -> float:
    """Rounded to what a plot can show: numbers travel as text."""
    return float(f"{value:.6g}")
