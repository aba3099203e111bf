"""The inline lane: batches run in this process, on the device's current stream."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import torch

from splitwiser_lab.errors import LaneError
from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.model.transformer import Transformer

_CLOCK_SECONDS = 20.0  # how long one anchor of the device's clock is trusted


class InlineLane:
    """Runs each batch at `submit`: to its end on a CPU, as far as launching it on a GPU."""

    def __init__(self, name: str, transformer: Transformer) -> None:
        self.name, self._transformer = name, transformer
        self.cores: list[int] = []  # whatever the process has
        cuda = torch.device(transformer.weights.device).type == "cuda"
        self._clock = DeviceClock() if cuda else None

    def start(self) -> None:
        """Nothing to prepare."""

    def submit(self, batch: Batch) -> HostTicket | DeviceTicket:
        try:
            if self._clock is None:
                return HostTicket(run_timed(self._transformer, batch))
            return DeviceTicket(self._transformer, batch, self._clock)
        except Exception as error:
            raise LaneError(f"lane {self.name!r}: a batch failed: {error}") from error

    def close(self) -> None:
        """Nothing of its own to give back."""


def run_timed(transformer: Transformer, batch: Batch) -> BatchResult:
    """Run a batch to its end on a CPU."""
    start = time.perf_counter()
    picked = transformer.run(batch).tolist()
    return BatchResult(spread(batch, picked), start, time.perf_counter())


def spread(batch: Batch, picked: list[int]) -> list[int | None]:
    """One entry per sequence: its picked token, or None where none was asked for."""
    tokens = iter(picked)
    return [None if s.sampling is None else next(tokens) for s in batch.sequences]


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


class DeviceClock:
    """Translates CUDA events into the host's `time.perf_counter`."""

    def __init__(self) -> None:
        self._anchor()

    def _anchor(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self._event.record()
        self._event.synchronize()
        self._host = time.perf_counter()

    def refresh(self) -> None:
        """Anchor anew now and then: the device counts in single-precision milliseconds from the anchor."""
        if time.perf_counter() - self._host > _CLOCK_SECONDS:
            self._anchor()

    def host_time(self, event: torch.cuda.Event) -> float:
        """When `event`, which must be complete, happened on the host's clock, in seconds."""
        return self._host + float(self._event.elapsed_time(event)) / 1e3


class DeviceTicket:
    """A batch launched on a GPU; its tokens are copied to the host behind it on the same stream."""

    def __init__(self, transformer: Transformer, batch: Batch, clock: DeviceClock) -> None:
        clock.refresh()
        self._batch, self._clock = batch, clock
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._start.record()
        picked = transformer.run(batch)
        self._host_tokens = torch.empty(picked.shape, dtype=picked.dtype, pin_memory=True)
        self._host_tokens.copy_(picked, non_blocking=True)
        self._end.record()

    def done(self) -> bool:
        return bool(self._end.query())

    def result(self) -> BatchResult:
        self._end.synchronize()
        start, end = (self._clock.host_time(event) for event in (self._start, self._end))
        return BatchResult(spread(self._batch, self._host_tokens.tolist()), start, end)

    def connection(self) -> Connection | None:
        return None
