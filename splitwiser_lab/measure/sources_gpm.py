"""GPM, the performance counters that NVML reads on Hopper and newer GPUs: how much of the GPU was at work."""

from __future__ import annotations

import math
import time
from typing import Any

from splitwiser_lab.measure.sources import Board, Metric, why
from splitwiser_lab.measure.sources_nvml import NvmlDevice, for_ever

_APART_SECONDS = 0.1  # between two samples, says NVML's documentation
_COUNTERS = {  # our key -> NVML's name of the counter, label
    "sm": ("NVML_GPM_METRIC_SM_UTIL", "SMs at work"),
    "occupancy": ("NVML_GPM_METRIC_SM_OCCUPANCY", "SM occupancy (warps)"),
    "tensor": ("NVML_GPM_METRIC_ANY_TENSOR_UTIL", "tensor cores at work"),
    "dram": ("NVML_GPM_METRIC_DRAM_BW_UTIL", "memory bandwidth"),
}


class GpmSource:
    """Each value is the mean between two samples at least 100 ms apart; between those the last value stands."""

    def __init__(self, device: NvmlDevice) -> None:
        self._device = device
        self._board = Board(
            Metric(key, label, "% of its peak" if key == "dram" else "%", 100.0, "GPM, mean of ≥100 ms")
            for key, (_, label) in _COUNTERS.items()
        )
        self._values: dict[str, float | None] = dict.fromkeys(_COUNTERS)
        self._older: Any = None
        self._older_time = 0.0
        self._samples: list[Any] = []
        self._supported = True
        try:
            if not device.ask("nvmlGpmQueryDeviceSupport").isSupportedDevice:
                self._give_up("this GPU has no GPM (Hopper and newer have)")
        except Exception as error:  # an older driver, an older GPU, no rights: N/A like the rest
            self._give_up(why(error))

    def metrics(self) -> list[Metric]:
        return self._board.all()

    def read(self) -> dict[str, float | None]:
        now = time.perf_counter()
        if self._supported and (self._older is None or now - self._older_time >= _APART_SECONDS):
            try:
                self._advance(now)
            except Exception as error:  # a lost GPU: from the next sample on it may go on
                self._older, self._values = None, dict.fromkeys(_COUNTERS)
                self._say(why(error))
                self._supported = not for_ever(error)
        return dict(self._values)

    def close(self) -> None:
        for sample in self._samples:
            try:
                self._device.nvml.nvmlGpmSampleFree(sample)
            except Exception:
                break  # the library is gone, and its memory with it
        self._samples, self._older = [], None

    def _advance(self, now: float) -> None:
        """Take a sample, and compare it with the one before."""
        while len(self._samples) < 2:
            self._samples.append(self._device.nvml.nvmlGpmSampleAlloc())
        newer = self._samples[0] if self._older is not self._samples[0] else self._samples[1]
        self._device.ask("nvmlGpmSampleGet", newer)
        if self._older is not None:
            self._values = self._compare(self._older, newer)
        self._older, self._older_time = newer, now

    def _compare(self, older: Any, newer: Any) -> dict[str, float | None]:
        nvml = self._device.nvml
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(_COUNTERS)
        asked.sample1, asked.sample2 = older, newer
        for place, (name, _) in enumerate(_COUNTERS.values()):
            asked.metrics[place].metricId = getattr(nvml, name)
        nvml.nvmlGpmMetricsGet(asked)
        values: dict[str, float | None] = {}
        for place, key in enumerate(_COUNTERS):
            answer = asked.metrics[place]
            good = answer.nvmlReturn == nvml.NVML_SUCCESS and math.isfinite(answer.value)
            values[key] = float(answer.value) if good else None
            reason = "" if good else f"this GPU does not count it (NVML error {answer.nvmlReturn})"
            self._board.note(key, reason=reason)
        return values

    def _give_up(self, reason: str) -> None:
        self._supported = False
        self._say(reason)

    def _say(self, reason: str) -> None:
        self._board.note(*_COUNTERS, reason=reason)
