"""What a monitor reads from: sources of metrics. This file knows what one is; the readers are beside it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import psutil

_FAMILY_SECONDS = 2.0  # how long a list of child processes is believed: making one walks over all processes


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that is watched. `ceiling` is in `unit`, None where none is known.

    `source` says who tells; `reason` says why nothing is told (N/A), and is empty while values come.
    """

    key: str
    label: str
    unit: str
    ceiling: float | None = None
    source: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read at one moment; `time` in seconds, None in `values` is N/A.

    A monitor's clock is `time.perf_counter`; a recording's starts with its run.
    """

    time: float
    values: Mapping[str, float | None]


class Source(Protocol):
    """Reads some metrics. `read` never raises: what cannot be had is None, and the metric's `reason` says why."""

    def metrics(self) -> list[Metric]:
        """What it reads, with the reasons of this moment."""
        ...

    def read(self) -> Mapping[str, float | None]:
        """The value of each metric by key; None is N/A. Rates are means since the call before."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class Board:
    """The metrics of one source by key, with what is known of each at this moment."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = {metric.key: metric for metric in metrics}

    def all(self) -> list[Metric]:
        """All of them, in the order given."""
        return list(self._metrics.values())

    def note(self, *keys: str, reason: str | None = None, source: str | None = None) -> None:
        """Remember why these are N/A ("" once they are not), or who tells them."""
        for key in keys:
            old = self._metrics[key]
            new = replace(
                old, reason=old.reason if reason is None else reason, source=old.source if source is None else source
            )
            if new != old:
                self._metrics[key] = new


class Family:
    """This process and its descendants, among them the process lanes."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._children: list[psutil.Process] = []
        self._listed = -_FAMILY_SECONDS

    def processes(self) -> list[psutil.Process]:
        """All of them, as of at most two seconds ago; some may have ended meanwhile."""
        if time.monotonic() - self._listed >= _FAMILY_SECONDS:
            self._listed = time.monotonic()
            try:
                self._children = self._own.children(recursive=True)
            except psutil.Error:
                self._children = []  # a process that vanishes while they are listed; they are listed again soon
        return [self._own, *self._children]


def why(error: Exception) -> str:
    """An exception as a reason for N/A."""
    return f"{error}" or type(error).__name__
