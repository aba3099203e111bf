"""One moment of the live view as plain data: what the plots, the numbers and the line about the tokens are made of.

It is the same for an engine at work and for recorded runs; what draws it cannot tell them apart but for `recorded`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from splitwiser_lab.measure.stretch import Stretch
from splitwiser_lab.timeline import Timeline

State = Literal["ready", "preparing", "running", "stopped", "failed"]


class Reading(Protocol):
    """One reading of a monitor: `values` by key of the metric, None where it could not be had."""

    @property
    def time(self) -> float:
        """When, in seconds."""
        ...

    @property
    def values(self) -> Mapping[str, float | None]:
        """What was read, by key of the metric."""
        ...


@dataclass(frozen=True)
class Part:
    """What happened between `start` and `end` (seconds on the view's clock) under one mode with its options.

    All times inside, of `timeline`, `readings` and `kv` (moment, share of the pool's pages in use), are on that
    clock too. The timeline may reach beyond the part: only what lies inside is shown.
    """

    label: str
    start: float
    end: float
    timeline: Timeline
    readings: tuple[Reading, ...] = ()
    kv: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of the hardware plot: a metric's key, and what it is called."""

    key: str
    label: str


@dataclass(frozen=True)
class TokenLine:
    """Whether tokens equal the reference's: yes, no, or not known (None), and the sentence that says so."""

    holds: bool | None
    text: str


@dataclass(frozen=True)
class Frame:
    """The last `window` seconds before `now`, in parts from the oldest on, each of which begins with a flip.

    `before` and `after` are the figures of the stretch before the latest flip, and of the one since. `waiting` and
    `running` count requests. `heading` says what is shown, on which machine, and if it was recorded, when; `lines`
    what of the hardware is plotted.
    """

    now: float
    window: float
    parts: tuple[Part, ...]
    before: Stretch | None
    after: Stretch | None
    tokens: TokenLine
    state: State
    message: str
    heading: str
    recorded: bool
    lines: tuple[Line, ...]
    waiting: int = 0
    running: int = 0

    @property
    def start(self) -> float:
        """Where the window begins; 0 until it is full."""
        return max(0.0, self.now - self.window)

    def last(self, seconds: float) -> tuple[float, float]:
        """The time axis for the last `seconds`: it begins at 0, and moves on once they are full."""
        start = max(0.0, self.now - seconds)
        return start, start + seconds

    @property
    def flips(self) -> list[tuple[float, str]]:
        """Moments inside the window at which the mode or its options changed, and to what."""
        return [(part.start, part.label) for part in self.parts[1:] if part.start > self.start]

    @property
    def lanes(self) -> list[str]:
        """Names of the lanes in the window, in order of first use."""
        return list(dict.fromkeys(lane for part in self.parts for lane in part.timeline.lanes))
