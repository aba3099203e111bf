"""Watches the hardware while something runs: a thread fills a ring buffer, and does nothing else.

    with Monitor(engine.device) as monitor:
        result = engine.generate(prompts)
    monitor.rows()

It knows no engine and draws nothing. Its clock is `time.perf_counter`, that of the engine's spans, so that
what the hardware did can be laid beside what the lanes did.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any

import torch

from splitwiser_lab.errors import SplitwiserError
from splitwiser_lab.hardware import choose_device
from splitwiser_lab.measure.sources import Metric, Sample, Source
from splitwiser_lab.measure.sources_cpu import CpuSource

__all__ = ["Metric", "Monitor", "Source", "Tag", "open_sources"]

MOST_OVERHEAD = 0.01  # share of one core's time that watching may take; samples come less often before it is more

_STOP_SECONDS = 5.0  # a driver that hangs must not hang whoever stops the monitor


@dataclass(frozen=True, slots=True)
class Tag:
    """A stretch of time with a name, on the same clock."""

    name: str
    start: float
    end: float


class Monitor:
    """Reads every metric each `interval_s` seconds, in a thread of its own, from `start` to `stop`."""

    def __init__(
        self,
        device: str = "auto",
        interval_s: float = 0.1,
        *,
        keep: int = 6000,
        sources: Sequence[Source] | None = None,
    ) -> None:
        """Watch `device` ("auto", "cpu", "cuda", "cuda:1"), or these `sources`; the last `keep` samples stay.

        Raises HardwareError for a device that is not there, and SplitwiserError for an impossible interval.
        """
        if not interval_s > 0 or keep < 1:
            raise SplitwiserError(f"interval_s={interval_s}, keep={keep}: give a positive interval and keep 1 or more.")
        self.interval_s = interval_s
        self._sources = list(open_sources(device) if sources is None else sources)
        self._samples: deque[Sample] = deque(maxlen=keep)
        self._tags: list[Tag] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = self._ended = 0.0
        self._spent = 0.0

    def start(self) -> None:
        """Begin to watch. Raises SplitwiserError when it began before: each monitor watches once."""
        if self._thread is not None:
            raise SplitwiserError("this monitor has been started before: make a new one, Monitor(device).")
        self._thread = threading.Thread(target=self._watch, name="splitwiser-lab-monitor", daemon=True)
        self._started = time.perf_counter()
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end the thread; samples and tags stay. Stopping again is fine."""
        if self._thread is None or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(_STOP_SECONDS)

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Everything watched: names, units, ceilings, and for what is N/A at this moment, why."""
        return tuple(chain.from_iterable(source.metrics() for source in self._sources))

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All that are still kept, in order of time."""
        with self._lock:
            return tuple(self._samples)

    @property
    def latest(self) -> Sample | None:
        """The newest sample, None before the first."""
        with self._lock:
            return self._samples[-1] if self._samples else None

    @property
    def tags(self) -> tuple[Tag, ...]:
        """All stretches named with `tag` that have ended, in order of their end."""
        with self._lock:
            return tuple(self._tags)

    @property
    def overhead(self) -> float:
        """Processor time of the watching itself, as a share of one core's time since the start."""
        passed = (self._ended or time.perf_counter()) - self._started
        return self._spent / passed if self._started and passed > 0 else 0.0

    @contextmanager
    def tag(self, name: str) -> Iterator[None]:
        """Name what happens inside: `with monitor.tag("prefill"): ...`; then `monitor.mean("cpu", "prefill")`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._tags.append(Tag(name, start, time.perf_counter()))

    def series(self, key: str, since: float = 0.0) -> tuple[list[float], list[float]]:
        """Times and values of one metric from `since` on, without what was N/A."""
        points = [(s.time, v) for s in self.samples if s.time >= since and (v := s.values.get(key)) is not None]
        return [time for time, _ in points], [value for _, value in points]

    def mean(self, key: str, tag: str | None = None) -> float | None:
        """Mean of one metric over all samples, or over those inside the stretches of that name; None is N/A."""
        values = self._values(key, tag)
        return sum(values) / len(values) if values else None

    def rows(self, tag: str | None = None) -> list[dict[str, Any]]:
        """One row per metric, ready for a table; the last row is what the watching itself cost."""
        rows = []
        for metric in self.metrics:
            values = self._values(metric.key, tag)
            mean = sum(values) / len(values) if values else None
            note = metric.reason or ("" if values else "no sample yet")
            figures = {"mean": mean, "max": max(values, default=None), "ceiling": metric.ceiling}
            rows.append({"metric": metric.label, "unit": metric.unit, **figures, "N/A because": note})
        cost = {"mean": 100 * self.overhead, "max": None, "ceiling": 100 * MOST_OVERHEAD, "N/A because": ""}
        return [*rows, {"metric": "the monitor itself", "unit": "% of one core", **cost}]

    def _values(self, key: str, tag: str | None) -> list[float]:
        inside = [t for t in self.tags if t.name == tag]
        return [
            value
            for sample in self.samples
            if (value := sample.values.get(key)) is not None
            and (tag is None or any(t.start <= sample.time <= t.end for t in inside))
        ]

    def _watch(self) -> None:
        """The thread. It rests long enough after each reading to keep its own share of a core below the limit."""
        last = False
        while not last:
            last = self._stop.is_set()
            before = time.thread_time()
            values = dict(chain.from_iterable(source.read().items() for source in self._sources))
            with self._lock:
                self._samples.append(Sample(time.perf_counter(), values))
            spent = time.thread_time() - before
            self._spent += spent
            if not last:
                self._stop.wait(max(self.interval_s, spent / MOST_OVERHEAD))
        self._ended = time.perf_counter()
        for source in self._sources:
            source.close()


def open_sources(device: str = "auto") -> list[Source]:
    """What can be read about `device`: on a CPU each core, on a GPU what NVML and GPM have and the CPU's load."""
    where = torch.device(choose_device(device).value)
    if where.type == "cpu":
        return [CpuSource()]
    import pynvml

    from splitwiser_lab.measure.sources_gpm import GpmSource
    from splitwiser_lab.measure.sources_nvml import NvmlDevice, NvmlSource

    index = torch.cuda.current_device() if where.index is None else where.index
    # Numbers differ from NVML's under CUDA_VISIBLE_DEVICES; the name of the very piece does not.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    gpu = NvmlDevice(pynvml, f"GPU-{uuid}" if uuid else None, index)
    return [GpmSource(gpu), NvmlSource(gpu), CpuSource(only_load=True)]
