"""What NVIDIA's driver tells through NVML: utilisation, memory, power, clocks, temperature.

"GPU busy" is the share of time in which any kernel ran at all: it reads 100 % with or without co-location.
How much of the GPU was at work is told by `sources_gpm`, and by what the engine derives itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from splitwiser_lab.measure.sources import Board, Family, Metric, why

_MEAN, _LAST = "NVML, mean of the driver's own samples", "NVML, value of the moment"
_VALUE_FIELDS = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal"}  # nvmlValueType_t
_FOR_EVER = ("NotSupported", "NoPermission", "FunctionNotFound", "LibraryNotFound")


class NvmlDevice:
    """One GPU as NVML knows it. Without driver, library or GPU, `handle` is None and `reason` says why."""

    def __init__(self, nvml: Any, uuid: str | None = None, index: int = 0) -> None:
        """`nvml` is the module `pynvml`. `uuid` ("GPU-...") finds the GPU that PyTorch uses, `index` is second best."""
        self.nvml, self.handle, self.reason = nvml, None, ""
        self._open = False
        try:
            nvml.nvmlInit()
        except Exception as error:  # no driver, no library: there is nothing to close either
            self.reason = why(error)
            return
        self._open = True
        try:
            self.handle = nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception as error:
            self.reason = why(error)

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call the NVML function of that name for this GPU. Raises whatever NVML raises."""
        if self.handle is None:
            raise OSError(self.reason)
        return getattr(self.nvml, name)(self.handle, *arguments)

    def close(self) -> None:
        """Give the library back; it counts its users. Closing again is fine."""
        if self._open:
            self._open, self.handle, self.reason = False, None, "the monitor has been stopped"
            with contextlib.suppress(Exception):  # a lost GPU: there is nothing left to give back
                self.nvml.nvmlShutdown()


class NvmlSource:
    """The metrics that every NVIDIA GPU of the last ten years has, most of them."""

    def __init__(self, device: NvmlDevice) -> None:
        self._device, self._family = device, Family()
        self._seen: dict[int, int] = {}  # kind of driver sample -> time of the last one, in microseconds
        self._given_up: set[str | int] = set()
        self._queries = self._make_queries()
        self._board = Board(self._describe())

    def metrics(self) -> list[Metric]:
        return self._board.all()

    def read(self) -> dict[str, float | None]:
        return {key: self._value(key, query) for key, query in self._queries.items()}

    def close(self) -> None:
        self._device.close()

    def _describe(self) -> list[Metric]:
        limit, ask, nvml = self._ceiling, self._device.ask, self._device.nvml
        slow = nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        whole = limit(lambda: ask("nvmlDeviceGetMemoryInfo").total / 1e9)
        power = limit(lambda: ask("nvmlDeviceGetEnforcedPowerLimit") / 1e3)
        fastest = limit(lambda: ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM))
        fastest_memory = limit(lambda: ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM))
        heat = limit(lambda: ask("nvmlDeviceGetTemperatureThreshold", slow))
        return [
            Metric("gpu", "GPU busy (any kernel)", "%", 100.0, _LAST),
            Metric("memory_controller", "memory busy (any access)", "%", 100.0, _LAST),
            Metric("memory", "GPU memory in use", "GB", whole, _LAST),
            Metric("process_memory", "GPU memory of this process and its lanes", "GB", whole, _LAST),
            Metric("power", "power", "W", power, _LAST),
            Metric("sm_clock", "SM clock", "MHz", fastest, _LAST),
            Metric("memory_clock", "memory clock", "MHz", fastest_memory, _LAST),
            Metric("temperature", "temperature", "°C", heat, _LAST),
        ]

    def _make_queries(self) -> dict[str, Callable[[], float]]:
        nvml, ask = self._device.nvml, self._device.ask
        return {
            "gpu": lambda: self._mean_or("gpu", nvml.NVML_GPU_UTILIZATION_SAMPLES, lambda: self._utilisation().gpu),
            "memory_controller": lambda: self._mean_or(
                "memory_controller", nvml.NVML_MEMORY_UTILIZATION_SAMPLES, lambda: self._utilisation().memory
            ),
            "memory": lambda: ask("nvmlDeviceGetMemoryInfo").used / 1e9,
            "process_memory": self._process_memory,
            "power": lambda: (
                self._mean_or("power", nvml.NVML_TOTAL_POWER_SAMPLES, lambda: ask("nvmlDeviceGetPowerUsage")) / 1e3
            ),
            "sm_clock": lambda: float(ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)),
            "memory_clock": lambda: float(ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM)),
            "temperature": lambda: float(ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)),
        }

    def _value(self, key: str, query: Callable[[], float]) -> float | None:
        """Ask, and take every failure for N/A; what this GPU will never tell is not asked again."""
        if key in self._given_up:
            return None
        try:
            value, reason = float(query()), ""
        except Exception as error:  # lost GPU, missing rights, dead process: a monitor must not stop a run
            value, reason = None, why(error)
            if for_ever(error):
                self._given_up.add(key)
        self._board.note(key, reason=reason)
        return value

    def _ceiling(self, query: Callable[[], float]) -> float | None:
        try:
            return float(query())
        except Exception:  # a ceiling is a help, not a value: without it the plot has no line
            return None

    def _utilisation(self) -> Any:
        return self._device.ask("nvmlDeviceGetUtilizationRates")

    def _mean_or(self, key: str, kind: int, momentary: Callable[[], float]) -> float:
        """Mean of the driver's buffered samples since the last reading; the value of the moment where it has none."""
        values: list[float] = []
        if kind not in self._given_up:
            try:
                values = self._buffered(kind)
            except Exception as error:  # not having new ones (NotFound) is an error to NVML
                if for_ever(error):
                    self._given_up.add(kind)
        self._board.note(key, source=_MEAN if values else _LAST)
        return sum(values) / len(values) if values else float(momentary())

    def _buffered(self, kind: int) -> list[float]:
        known = self._seen.get(kind)
        form, samples = self._device.ask("nvmlDeviceGetSamples", kind, known or 0)
        fresh = [sample for sample in samples if sample.timeStamp > (known or 0)]
        if not fresh:
            return []
        self._seen[kind] = max(sample.timeStamp for sample in fresh)
        used = fresh if known is not None else fresh[-1:]  # the first time, the buffer is full of the past
        return [float(getattr(sample.sampleValue, _VALUE_FIELDS[form])) for sample in used]

    def _process_memory(self) -> float:
        own = {process.pid for process in self._family.processes()}
        listed = self._device.ask("nvmlDeviceGetComputeRunningProcesses")
        used = [process.usedGpuMemory for process in listed if process.pid in own]
        if not used or None in used:
            raise OSError("the driver lists no memory for this process (in a container, process numbers differ)")
        return float(sum(used)) / 1e9


def for_ever(error: Exception) -> bool:
    """Whether asking again would give the same error: it is a matter of the GPU, the driver or the rights."""
    return type(error).__name__.removeprefix("NVMLError_") in _FOR_EVER
