"""A lane on a GPU: batches run on one CUDA stream, launched by this process and polled by events.

Which SMs the stream may use, and with what priority, was decided by whoever made the stream. A lane
does all its work under it, so that what is allocated or captured there belongs to it alone.
"""

from __future__ import annotations

import contextlib
import time
from multiprocessing.connection import Connection

import torch

from splitwiser_lab.errors import HardwareError, LaneError
from splitwiser_lab.lanes.base import spread
from splitwiser_lab.lanes.ranges import batch_range
from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.model.graph_shapes import UsualWork
from splitwiser_lab.model.products import ANOTHER_PART, check_products
from splitwiser_lab.model.runner import Runner, runner_for
from splitwiser_lab.model.transformer import Transformer

_CLOCK_SECONDS = 20.0  # how long one anchor of the device's clock is trusted


class DeviceLane:
    """Launches each batch at `submit` and returns; the device runs them in order."""

    def __init__(
        self,
        name: str,
        transformer: Transformer,
        stream: torch.cuda.Stream,
        multiprocessors: int | None = None,
        part: str = "",
    ) -> None:
        """`multiprocessors` are those that the stream may use; None for all that this process has.

        `part` says in words which part of the GPU that is ("with 48 of 132 SMs"); "" if it is all of it.
        """
        self.name, self.stream = name, stream
        self.cores: list[int] = []  # the host only launches: whatever the process has
        self._transformer, self._multiprocessors, self._part = transformer, multiprocessors, part
        self._clock: DeviceClock | None = None
        self._runner: Runner | None = None

    @property
    def depth(self) -> int:
        """Batches that may be under way: more than one where picked tokens stay on the device."""
        return self._runner.depth if self._runner else 1

    def start(self) -> None:
        """Let what other streams wrote so far (weights, pool) be seen on this one, and set the clock.

        Raises LaneError where the lane's part of the GPU computes wrong products.
        """
        if self._clock is None:
            # Not the whole device: while another lane captures a graph, that would fail, and spoil the graph.
            for stream in torch.cuda.default_stream(self.stream.device), torch.cuda.current_stream(self.stream.device):
                stream.synchronize()
            self._clock = DeviceClock(self.stream.device)
        if self._runner is None:
            self._runner = self._make_runner()

    def _make_runner(self) -> Runner:
        try:
            with torch.cuda.stream(self.stream):
                if self._part:
                    check_products(self._transformer.weights.multiplied(), self._part, ANOTHER_PART)
                return runner_for(self._transformer, self._multiprocessors)
        except HardwareError as error:
            raise LaneError(f"lane {self.name!r}: {error}") from error
        except RuntimeError as error:
            where, advice = (self._part, f" {ANOTHER_PART}") if self._part else ("on this GPU", "")
            raise LaneError(f"lane {self.name!r}: it cannot start {where}: {error}{advice}") from error

    def warm_up(self, work: UsualWork) -> None:
        """Compile and capture on the lane's own stream, and wait until the device has done its part of it."""
        try:
            self.start()
            assert self._runner is not None
            with torch.cuda.stream(self.stream):
                self._runner.warm_up(work)
            self.stream.synchronize()
        except LaneError:
            raise
        except Exception as error:
            raise LaneError(f"lane {self.name!r}: its warm-up failed: {error}") from error

    def submit(self, batch: Batch) -> DeviceTicket:
        try:
            self.start()
            assert self._clock is not None and self._runner is not None
            with torch.cuda.stream(self.stream), batch_range(self.name, batch):
                return DeviceTicket(self.name, self._runner, batch, self._clock)
        except LaneError:
            raise
        except Exception as error:
            raise LaneError(f"lane {self.name!r}: a batch failed: {error}") from error

    def close(self) -> None:
        """Wait until the device has done what was launched here."""
        clock, self._clock, self._runner = self._clock, None, None
        if clock is not None:
            with contextlib.suppress(RuntimeError):  # a GPU that has failed this process does not get better by waiting
                self.stream.synchronize()


class DeviceClock:
    """Translates CUDA events into the host's `time.perf_counter`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # always empty, so that setting the clock waits for no batch
        self._anchor()

    def _anchor(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(self._stream)
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
    """A batch launched on the current stream; its tokens are copied to the host behind it."""

    def __init__(self, lane: str, runner: Runner, batch: Batch, clock: DeviceClock) -> None:
        clock.refresh()
        self._lane, self._batch, self._clock = lane, batch, clock
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        picked = runner.run(batch, self._start.record)
        self._host_tokens = torch.empty(picked.shape, dtype=picked.dtype, pin_memory=True)
        self._host_tokens.copy_(picked, non_blocking=True)
        self._end.record()

    def done(self) -> bool:
        try:
            return bool(self._end.query())
        except RuntimeError:  # a kernel failed: `result` says which way
            return True

    def result(self) -> BatchResult:
        try:
            self._end.synchronize()
        except RuntimeError as error:
            raise LaneError(
                f"lane {self._lane!r}: a batch failed on the device: {error} "
                "The GPU refuses this process from now on: restart it (in Jupyter, the kernel)."
            ) from error
        start, end = (self._clock.host_time(event) for event in (self._start, self._end))
        return BatchResult(spread(self._batch, self._host_tokens.tolist()), start, end)

    def connection(self) -> Connection | None:
        return None
