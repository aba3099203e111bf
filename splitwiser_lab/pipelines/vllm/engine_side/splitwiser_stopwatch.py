"""Bytes and seconds of handing keys and values over: noted by a connector, read by the loop that steps its engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Bytes and seconds of what was moved in a step, `save` or `load`."""

    def __init__(self) -> None:
        self._moved: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[list[float]]:
        """Time a block, which adds its bytes to element 0 of what it is given."""
        start, moved = time.monotonic(), [0.0]
        yield moved
        if moved[0]:
            total = self._moved.setdefault(what, [0.0, 0.0])
            total[0] += moved[0]
            total[1] += time.monotonic() - start

    def take(self) -> list[list[Any]]:
        """`[what, bytes, seconds]` of all since the last call."""
        moved, self._moved = self._moved, {}
        return [[what, int(nbytes), seconds] for what, (nbytes, seconds) in moved.items()]


stopwatch = Stopwatch()  # of this process: a connector and the loop that steps its engine
