"""NVML without a GPU: the real module's names, structures and errors, and answers that a test can take away."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pynvml

_GPM_VALUES = {2: 61.0, 3: 23.5, 5: 40.25, 10: 88.0}  # by NVML's number of the metric


class FakeNvml:
    """One H200. `broken` maps the name of a function (or "all") to the error it raises."""

    def __init__(self, pids: tuple[int, ...] = (), gpm: bool = True) -> None:
        self.broken: dict[str, Exception] = {}
        self.missing_gpm: set[int] = set()
        self.calls: list[str] = []
        self.users = 0
        self.gpm_times: list[tuple[float, float]] = []
        self.buffer: list[tuple[int, int]] = [(1_000, 99), (2_000, 10)]
        self._pids, self._gpm, self._numbers = pids, gpm, itertools.count()
        self._taken: dict[int, float] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml") and hasattr(pynvml, name):
            return lambda *arguments: self._answer(name, *arguments)
        return getattr(pynvml, name)

    def _answer(self, name: str, *arguments: Any) -> Any:
        self.calls.append(name)
        if error := self.broken.get(name, self.broken.get("all")):
            raise error
        return getattr(self, f"_{name}")(*arguments)

    def _nvmlInit(self) -> None:
        self.users += 1

    def _nvmlShutdown(self) -> None:
        self.users -= 1

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"handle of {uuid}"

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle of {index}"

    def _nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=97, memory=35)

    def _nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=5_000_000_000, total=141_000_000_000)

    def _nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 412_500

    def _nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def _nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {pynvml.NVML_CLOCK_SM: 1755, pynvml.NVML_CLOCK_MEM: 3201}[kind]

    def _nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}[kind]

    def _nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 54

    def _nvmlDeviceGetTemperatureThreshold(self, handle: str, kind: int) -> int:
        return 87

    def _nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=1_500_000_000) for pid in (*self._pids, 999_999_999)]

    def _nvmlDeviceGetSamples(self, handle: str, kind: int, last: int) -> tuple[int, list[Any]]:
        if kind != pynvml.NVML_GPU_UTILIZATION_SAMPLES:
            raise pynvml.NVMLError_NotSupported()
        fresh = [(stamp, value) for stamp, value in self.buffer if stamp > last]
        if not fresh:
            raise pynvml.NVMLError_NotFound()
        return 1, [SimpleNamespace(timeStamp=t, sampleValue=SimpleNamespace(uiVal=v)) for t, v in fresh]

    def _nvmlGpmQueryDeviceSupport(self, handle: str) -> Any:
        return SimpleNamespace(isSupportedDevice=int(self._gpm))

    def _nvmlGpmSampleAlloc(self) -> Any:
        sample = pynvml.c_nvmlGpmSample_t()
        sample.contents = type(sample)._type_()  # memory of its own, so that two samples differ
        return sample

    def _nvmlGpmSampleGet(self, handle: str, sample: Any) -> None:
        self._taken[_address(sample)] = time.perf_counter()

    def _nvmlGpmSampleFree(self, sample: Any) -> None:
        del self._taken[_address(sample)]

    def _nvmlGpmMetricsGet(self, asked: Any) -> None:
        self.gpm_times.append((self._taken[_address(asked.sample1)], self._taken[_address(asked.sample2)]))
        for place in range(asked.numMetrics):
            metric = asked.metrics[place]
            absent = metric.metricId in self.missing_gpm
            metric.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED if absent else pynvml.NVML_SUCCESS
            metric.value = float("nan") if absent else _GPM_VALUES[metric.metricId]


def _address(sample: Any) -> int:
    import ctypes

    return ctypes.cast(sample, ctypes.c_void_p).value or 0
