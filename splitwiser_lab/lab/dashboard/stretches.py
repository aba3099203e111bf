"""Keeps the stretches of a live run apart: where each began, its figures, and what "alone" means on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from splitwiser_lab.lab.dashboard.traffic import Task
from splitwiser_lab.measure.stretch import ALONE_MODE, Alone, Stretch
from splitwiser_lab.timeline import ModeChange, Span, Timeline

_TOGETHER = 4  # requests that decode in one batch when phases are timed
_CLOCK_S = 1e-6  # what adding and subtracting seconds may have rounded away
_SHORTEST_S = 0.3  # a stretch shorter than this has no figures yet


@dataclass(frozen=True)
class _Start:
    """`comparable`: the same work went on before it, so that the figures before and after mean something."""

    time: float
    label: str
    comparable: bool


class Stretches:
    """Fed with the engine's recent timeline now and then; times in seconds on the view's clock."""

    def __init__(self, horizon: float) -> None:
        """`horizon`: figures are those of at most so many seconds, so long as the timelines given reach."""
        self._horizon = horizon
        self._starts: list[_Start] = []
        self._lock = threading.Lock()
        self._alone_spans: list[Span] = []
        self._alone: Alone | None = None
        self._before: tuple[float, Stretch | None] = (-1.0, None)

    def calibrate(self, engine: Any, tasks: Sequence[Task], new_tokens: int) -> Alone | None:
        """Run one task by itself and then four together in `sequential`, and learn what each phase takes alone."""
        engine.set_mode(ALONE_MODE)
        four = list(islice(cycle(tasks), _TOGETHER))
        engine.generate([list(tasks[0].prompt)], 2, ignore_eos=True)  # warms up
        began = time.perf_counter()
        for group in (four[:1], four):
            engine.generate([list(task.prompt) for task in group], new_tokens, ignore_eos=True)
        self._alone_spans = list(engine.timeline(began).spans)
        self._alone = Alone.fit(self._alone_spans)
        return self._alone

    def begin(self, now: float, mode: str) -> None:
        """Work begins, anew or of another kind: what came before is not to be compared with."""
        with self._lock:
            self._starts.append(_Start(now, mode, False))

    def update(self, timeline: Timeline, since: float, now: float) -> tuple[Stretch | None, Stretch | None]:
        """Take notice of flips in `timeline`; return the figures before the latest flip, and those after it.

        The timeline begins at `since`, and the first of its modes is the one that held there: no flip.
        """
        with self._lock:
            known = max(self._starts[-1].time, since + _CLOCK_S) if self._starts else now
            new = [change for change in timeline.modes if change.time > known]
            self._starts += [_Start(change.time, label_of(change), True) for change in new]
            starts = list(self._starts)
        if any(span.mode == ALONE_MODE for span in timeline.spans):
            self._alone = Alone.fit([*self._alone_spans, *timeline.spans])
        if not starts:
            return None, None
        last = starts[-1]
        if last.comparable and last.time != self._before[0]:
            self._before = (last.time, self._figures(timeline, starts[-2], last.time))
        before = self._before[1] if last.comparable else None
        return before, self._figures(timeline, last, now)

    def between(self, start: float, end: float) -> list[tuple[str, float, float]]:
        """Label, begin and end of each stretch that reaches into this time, cut to it."""
        with self._lock:
            starts = list(self._starts)
        ends = [s.time for s in starts[1:]] + [max(end, starts[-1].time)] if starts else []
        return [
            (s.label, max(start, s.time), min(end, until))
            for s, until in zip(starts, ends, strict=True)
            if until > start and s.time < end
        ]

    def _figures(self, timeline: Timeline, of: _Start, end: float) -> Stretch | None:
        start = max(of.time, end - self._horizon)
        return Stretch.of(timeline, of.label, start, end, self._alone) if end - start >= _SHORTEST_S else None


def label_of(change: ModeChange) -> str:
    """A mode with the options that were set, e.g. `chunked (chunk_tokens=64)`, or with what `auto` chose."""
    options = ", ".join(f"{name}={value}" for name, value in change.options.items())
    mode = f"{change.mode}: {change.runs}" if change.runs else change.mode
    return f"{mode} ({options})" if options else mode
