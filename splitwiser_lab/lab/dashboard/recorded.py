"""Recorded runs as a source of frames: the same view and controls, and no engine behind them.

All recordings of one kind of work are runs of the same requests, each in another mode. Choosing a mode goes on in
that mode's recording at the same moment: what the view then shows happened, on the machine that its heading names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitwiser_lab.engine.modes import MODES
from splitwiser_lab.errors import RecordingError
from splitwiser_lab.hardware import ModeSupport
from splitwiser_lab.lab.dashboard.frame import Frame, Line, Part, State, TokenLine
from splitwiser_lab.lab.dashboard.source import Knob
from splitwiser_lab.measure.recording import Recording, by_work
from splitwiser_lab.measure.stretch import Alone, Stretch

_WINDOW_S, _SHORTEST_S = 20.0, 0.05
_SPEEDS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_STEPS = 40  # of the slider for the moment
_AS_RECORDED = "as recorded"
_LABELS = {
    "sm": "SMs at work",
    "tensor": "tensor cores at work",
    "dram": "memory bandwidth",
    "gpu": "GPU busy (any kernel)",
    "cpu": "load of all cores",
    "process": "this process and its lanes",
}
_MOST_LINES = 4


@dataclass(frozen=True)
class _Segment:
    """From `start` on, seconds into the run, this recording was shown."""

    start: float
    label: str


class Replay:
    """Recordings that can be played, stopped, and flipped between. Made stopped, at the beginning."""

    def __init__(self, recorded: Sequence[Recording], speed: float = 1.0) -> None:
        """`speed`: seconds of the run per second. Raises RecordingError when there is nothing to play."""
        if not recorded:
            raise RecordingError("there is no recording to play: give one, several, or a folder that holds some.")
        self._works = by_work(recorded)
        self._lines = _lines(recorded)
        self._speed = speed
        self._state: State = "ready"
        self._segments: list[_Segment] = []
        self._open(max(self._works, key=lambda work: len(self._works[work])))

    @property
    def modes(self) -> Sequence[ModeSupport]:
        recorded = {recording.mode for recording in self._runs.values()}
        there = [ModeSupport(label, True, "recorded") for label in self._runs]
        return there + [ModeSupport(mode, False, "not recorded") for mode in MODES if mode not in recorded]

    @property
    def mode(self) -> str:
        return self._segments[-1].label

    @property
    def knobs(self) -> Sequence[Knob]:
        asked = self._recording.workload
        step = self._duration / _STEPS
        moments = tuple((_written(step * n, "s"), n) for n in range(_STEPS + 1))
        works = tuple((f"{n} of {len(self._works)}", work) for n, work in enumerate(self._works, start=1))
        only = "" if len(works) > 1 else "all of these recordings are of one kind of work"
        fixed = (
            ("rate", "arrival rate", asked.get("requests_per_s"), "/s"),
            ("prompt_tokens", "prompt (p50)", asked.get("input_tokens_p50"), "tokens"),
            ("output_tokens", "output (p50)", asked.get("output_tokens_p50"), "tokens"),
        )
        return [
            Knob("moment", "moment", moments, min(_STEPS, round(self._now() / step))),
            Knob.of("speed", "speed", _SPEEDS, self._speed, "×"),
            Knob("work", "recorded work", works, self._work, only),
            *(
                Knob(name, label, ((_written(value, unit), value),), value, _AS_RECORDED)
                for name, label, value, unit in fixed
            ),
        ]

    @property
    def duration(self) -> float:
        """How long the longest of the runs took, in seconds."""
        return self._duration

    @property
    def shortest(self) -> float:
        """How long the shortest of the runs took, in seconds: until then there is something to see in each."""
        return min(recording.timeline.duration for recording in self._runs.values())

    @property
    def active(self) -> bool:
        return self._state == "running" and self._now() < self._duration

    def choose(self, mode: str) -> None:
        if mode != self.mode and mode in self._runs:
            now = self._now()
            self._segments = [s for s in self._segments if s.start < now] + [_Segment(now, mode)]

    def turn(self, name: str, value: Any) -> None:
        if name == "moment":
            self._seek(value * self._duration / _STEPS)
        elif name == "speed":
            self._seek(self._now())
            self._speed = float(value)
        elif name == "work" and value != self._work:
            self._open(value)

    def start(self) -> None:
        if self._now() >= self._duration:
            self._seek(0.0)
        self._seek(self._now())
        self._state = "running"

    def stop(self) -> None:
        self._seek(self._now())
        self._state = "stopped"

    def close(self) -> None:
        self.stop()

    def frame(self) -> Frame:
        now = self._now()
        if self._state == "running" and now >= self._duration:
            self.stop()
        window = min(_WINDOW_S, self._duration)
        ends = [segment.start for segment in self._segments[1:]] + [now]
        parts = [
            self._part(segment, end) for segment, end in zip(self._segments, ends, strict=True) if end > now - window
        ]
        live = [r for r in self._recording.timeline.requests if r.arrival <= now and (r.finished or now) >= now]
        waiting = sum(r.scheduled is None or r.scheduled > now for r in live)
        return Frame(
            now=now,
            window=window,
            parts=tuple(parts),
            before=self._stretch(self._segments[-2], self._segments[-1].start) if len(self._segments) > 1 else None,
            after=self._stretch(self._segments[-1], now),
            tokens=_token_line(self._recording),
            state=self._state,
            message=f"At {now:.1f} s of {self._duration:.1f} s.",
            heading=f"{self._recording.time_utc[:10]}, {self._work}",
            recorded=True,
            lines=self._lines,
            waiting=waiting,
            running=len(live) - waiting,
        )

    @property
    def _recording(self) -> Recording:
        return self._runs[self.mode]

    def _open(self, work: str) -> None:
        """Begin with the recordings of this work, in the order of the modes' table."""
        self._work, self._runs = work, in_order(self._works[work])
        self._duration = max(recording.timeline.duration for recording in self._runs.values())
        self._kv = {label: kv_use(recording) for label, recording in self._runs.items()}
        self._alone = next((a for r in self._runs.values() if (a := Alone.fit(r.timeline.spans))), None)
        self._segments = [_Segment(0.0, next(iter(self._runs)))]
        self._seek(0.0)

    def _now(self) -> float:
        """The moment of the run that is shown, in seconds since its start."""
        passed = time.perf_counter() - self._since if self._state == "running" else 0.0
        return min(self._duration, self._at + passed * self._speed)

    def _seek(self, moment: float) -> None:
        """Be at this moment; flips that lie after it are forgotten, but the mode stays."""
        kept = [s for s in self._segments if s.start < moment] or [_Segment(0.0, self.mode)]
        if kept[-1].label != self.mode:
            kept.append(_Segment(moment, self.mode))
        self._segments, self._at, self._since = kept, moment, time.perf_counter()

    def _part(self, segment: _Segment, end: float) -> Part:
        recording = self._runs[segment.label]
        return Part(segment.label, segment.start, end, recording.timeline, recording.samples, self._kv[segment.label])

    def _stretch(self, segment: _Segment, end: float) -> Stretch | None:
        start = max(segment.start, end - _WINDOW_S)
        if end - start < _SHORTEST_S:
            return None
        return Stretch.of(self._runs[segment.label].timeline, segment.label, start, end, self._alone)


def in_order(runs: Mapping[str, Recording]) -> dict[str, Recording]:
    """Runs by label, in the order of the modes' table."""
    order = list(MODES)
    return dict(sorted(runs.items(), key=lambda run: order.index(run[1].mode) if run[1].mode in order else len(order)))


def kv_use(recording: Recording) -> tuple[tuple[float, float], ...]:
    """(moment, share of the pool's pages in use), from the lengths of the requests that held pages then."""
    size, events = recording.page_size, list[tuple[float, int]]()
    for request in recording.timeline.requests:
        if request.scheduled is None:
            continue
        held = -(-request.prompt_tokens // size)
        events.append((request.scheduled, held))
        for number, moment in enumerate(request.token_times, start=1):
            if -(-(request.prompt_tokens + number) // size) > held:
                held += 1
                events.append((moment, 1))
        events.append((recording.timeline.duration if request.finished is None else request.finished, -held))
    points, pages = [(0.0, 0.0)], 0
    for moment, change in sorted(events):
        pages += change
        points.append((moment, pages * size / recording.kv_tokens))
    return tuple(points)


def _lines(recorded: Sequence[Recording]) -> tuple[Line, ...]:
    """What of the hardware these recordings hold: a GPU's figures, else each core where they are few."""
    keys = list(
        dict.fromkeys(key for recording in recorded for sample in recording.samples[:1] for key in sample.values)
    )
    cores = [key for key in keys if key.startswith("core_")]
    named = [key for key in _LABELS if key in keys]
    gpu = [key for key in named if key not in ("cpu", "process")]
    chosen = gpu or (cores if 0 < len(cores) <= _MOST_LINES else named)
    return tuple(Line(key, _LABELS.get(key, key.replace("_", " "))) for key in chosen[:_MOST_LINES])


def _token_line(recording: Recording) -> TokenLine:
    against = recording.tokens_against or "a reference"
    said = {
        True: f"identical: every token was that of {against} when this was recorded.",
        False: f"NOT all identical: when this was recorded, some differed from {against}.",
        None: "not compared with a reference when this was recorded.",
    }
    return TokenLine(recording.tokens_identical, said[recording.tokens_identical])


def _written(value: float | None, unit: str) -> str:
    if value is None:
        return "all at once"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
