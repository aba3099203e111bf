"""The inline lane of a CPU: batches run in this process, to their end, at `submit`."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

from splitwiser_lab.errors import LaneError
from splitwiser_lab.lanes.base import spread
from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.model.graph_shapes import UsualWork
from splitwiser_lab.model.transformer import Transformer


class InlineLane:
    """Runs each batch at `submit`, in the calling thread."""

    depth = 1

    def __init__(self, name: str, transformer: Transformer) -> None:
        self.name, self._transformer = name, transformer
        self.cores: list[int] = []  # whatever the process has

    def start(self) -> None:
        """Nothing to prepare."""

    def warm_up(self, work: UsualWork) -> None:
        """Nothing to make."""

    def submit(self, batch: Batch) -> HostTicket:
        try:
            return HostTicket(run_timed(self._transformer, batch))
        except Exception as error:
            raise LaneError(f"lane {self.name!r}: a batch failed: {error}") from error

    def close(self) -> None:
        """Nothing of its own to give back."""


def run_timed(transformer: Transformer, batch: Batch) -> BatchResult:
    """Run a batch to its end on a CPU."""
    start = time.perf_counter()
    picked = transformer.run(batch).tolist()
    return BatchResult(spread(batch, picked), start, time.perf_counter())


class HostTicket:
    """A batch that is already done."""

    def __init__(self, result: BatchResult) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def result(self) -> BatchResult:
        return self._result

    def connection(self) -> Connection | None:
        return None
