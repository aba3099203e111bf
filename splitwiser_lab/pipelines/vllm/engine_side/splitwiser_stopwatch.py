"""Bytes and seconds of handing keys and values over: noted by a connector, told when a run has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Moved:
    """What was moved for one request; `laps` are those of a GPU, as pairs of events, and a request's part in them."""

    nbytes: float = 0.0
    seconds: float = 0.0
    laps: list[tuple[Any, Any, float]] = field(default_factory=list)

    def total(self) -> float:
        """Seconds of all laps; waits until the GPU has ended them."""
        for begin, end, share in self.laps:
            end.synchronize()
            self.seconds += 1e-3 * begin.elapsed_time(end) * share
        self.laps.clear()
        return self.seconds


class Stopwatch:
    """What was moved, `save` or `load`, for which request. A GPU copies while the host goes on: its clock is read."""

    def __init__(self) -> None:
        self._moved: dict[str, dict[str, _Moved]] = {}  # request -> what -> how much

    @contextmanager
    def __call__(self, what: str, on_gpu: bool = False) -> Iterator[dict[str, float]]:
        """Time a block, which notes the bytes it moved by request; its seconds are divided by them."""
        begin, moved = _now(on_gpu), dict[str, float]()
        yield moved
        whole = sum(moved.values())
        if not whole:
            return
        end = _now(on_gpu)
        for request, nbytes in moved.items():
            total = self._moved.setdefault(request, {}).setdefault(what, _Moved())
            total.nbytes += nbytes
            if on_gpu:
                total.laps.append((begin, end, nbytes / whole))
            else:
                total.seconds += (end - begin) * nbytes / whole

    def take(self) -> list[list[Any]]:
        """`[what, bytes, seconds, request]` of all that was moved since this was last asked, once it is there."""
        taken, self._moved = self._moved, {}
        return [
            [what, int(moved.nbytes), moved.total(), request]
            for request, by_way in taken.items()
            for what, moved in by_way.items()
        ]


def _now(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.monotonic()
    import torch  # not above: the engine's program has this file before it chooses its cores, and torch asks for those

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


stopwatch = Stopwatch()  # of this process: a connector's, and the worker's that tells what it noted
