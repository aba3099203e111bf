"""What the operating system tells: load of each core, of this process and its lanes, memory, memory traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from splitwiser_lab import hardware
from splitwiser_lab.measure.sources import Board, Family, Metric, why

# Where Linux mounts the traffic counters of Intel's RDT and AMD's QoS.
_RESCTRL = Path("/sys/fs/resctrl")
_IDLE = ("idle", "iowait")
_SHORTEST_SECONDS = 0.05  # the system counts in hundredths of a second: over less, a load is noise
_TWICE = ("guest", "guest_nice")  # Linux counts them in user and nice as well


class CpuSource:
    """Load and memory of the machine as far as this process may use it."""

    def __init__(self, only_load: bool = False, resctrl: Path = _RESCTRL) -> None:
        """`only_load` leaves out single cores and memory (beside a GPU, which has memory of its own).

        `resctrl` is where the counters of memory traffic are mounted.
        """
        self._cores = hardware.cores()
        self._only_load, self._resctrl = only_load, resctrl
        self._family = Family()
        self._busy: dict[int, tuple[float, float]] = {}
        self._spent: dict[int, float] = {}
        self._traffic: float | None = None
        self._time = float("-inf")
        self._values: dict[str, float | None] = {}
        self._board = Board(self._describe())
        self.read()  # from here on the rates count

    def metrics(self) -> list[Metric]:
        return self._board.all()

    def read(self) -> dict[str, float | None]:
        now = time.perf_counter()
        seconds = now - self._time
        if seconds < _SHORTEST_SECONDS:
            return dict(self._values)
        self._time = now
        values = self._try(("cpu", *map(core_key, self._single_cores)), self._loads)
        values |= self._try(("process",), lambda: {"process": self._own_share(seconds)})
        if not self._only_load:
            values |= self._try(("memory",), lambda: {"memory": _used_memory()})
            values |= self._try(("memory_bandwidth",), lambda: {"memory_bandwidth": self._bandwidth(seconds)})
        self._values = values
        return dict(values)

    def close(self) -> None:
        """Nothing is held."""

    def _describe(self) -> Iterable[Metric]:
        count, told = len(self._cores), "operating system"
        yield Metric("cpu", f"load of {count} cores" if count > 1 else "load of the core", "%", 100.0, told)
        for core in self._single_cores:
            yield Metric(core_key(core), f"core {core}", "%", 100.0, told)
        yield Metric("process", "this process and its lanes", "% of the cores", 100.0, told)
        if self._only_load:
            return
        yield Metric("memory", "memory in use", "GB", psutil.virtual_memory().total / 1e9, told)
        yield Metric("memory_bandwidth", "memory traffic", "GB/s", None, "resctrl (RDT, QoS)")

    @property
    def _single_cores(self) -> Sequence[int]:
        return () if self._only_load else self._cores

    def _try(self, keys: Sequence[str], ask: Callable[[], dict[str, float | None]]) -> dict[str, float | None]:
        try:
            values, reason = ask(), ""
        except Exception as error:  # whatever this system does not have: a monitor must not stop a run
            values, reason = dict.fromkeys(keys), why(error)
        self._board.note(*keys, reason=reason)
        return values

    def _loads(self) -> dict[str, float | None]:
        before, times = self._busy, psutil.cpu_times(percpu=True)
        self._busy = {core: _busy_and_total(times[core]) for core in self._cores if core < len(times)}
        loads = {core: _share(before.get(core), now) for core, now in self._busy.items()}
        known = [load for load in loads.values() if load is not None]
        each = {core_key(core): loads.get(core) for core in self._single_cores}
        return {"cpu": sum(known) / len(known) if known else None, **each}

    def _own_share(self, seconds: float) -> float | None:
        """Processor time of the family since the last reading, in % of what the cores could have given."""
        before, self._spent = self._spent, {}
        for process in self._family.processes():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue  # it has ended: what it did since the last reading is lost, the others count
            self._spent[process.pid] = times.user + times.system
        gained = [max(0.0, spent - before[pid]) for pid, spent in self._spent.items() if pid in before]
        return min(100.0, 100 * sum(gained) / (seconds * len(self._cores))) if before and seconds else None

    def _bandwidth(self, seconds: float) -> float | None:
        """Bytes moved between the caches of all sockets and memory, in GB/s."""
        counters = list(self._resctrl.glob("mon_data/mon_L3_*/mbm_total_bytes"))
        if not counters:
            raise OSError("this system offers no counter of memory traffic (resctrl with RDT or QoS is not mounted)")
        before, self._traffic = self._traffic, float(sum(int(counter.read_text()) for counter in counters))
        return None if before is None or not seconds else (self._traffic - before) / seconds / 1e9


def core_key(core: int) -> str:
    """The metric of the core with this number."""
    return f"core_{core}"


def _busy_and_total(times: Any) -> tuple[float, float]:
    known = times._asdict()
    total = sum(seconds for name, seconds in known.items() if name not in _TWICE)
    return total - sum(known.get(name, 0.0) for name in _IDLE), total


def _share(before: tuple[float, float] | None, now: tuple[float, float]) -> float | None:
    if before is None or now[1] <= before[1]:
        return None
    return min(100.0, max(0.0, 100 * (now[0] - before[0]) / (now[1] - before[1])))


def _used_memory() -> float:
    memory = psutil.virtual_memory()
    return float(memory.total - memory.available) / 1e9
