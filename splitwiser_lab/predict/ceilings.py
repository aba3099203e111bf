"""How fast a machine can be at most: bytes per second from memory, FLOPs per second in a matrix product.

Measured here in about a second, or as the makers' data sheets state them. Data sheets promise more than any
program gets; what was measured is what a good kernel gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from splitwiser_lab import hardware
from splitwiser_lab.model.linear import linear

_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices multiplied
_READ_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # far more than any cache holds
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The two roofs of one machine in one dtype, and who says so."""

    name: str
    dtype: str
    flops_per_s: float
    bytes_per_s: float
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which both roofs meet: work of less is bound by memory, work of more by arithmetic."""
        return self.flops_per_s / self.bytes_per_s


_NVIDIA = "NVIDIA's data sheet, dense"
# FLOP/s on tensor cores in half precision, outside them in float32; bytes/s of the memory.
DATASHEETS = {
    ceilings.name + " " + ceilings.dtype: ceilings
    for ceilings in (
        Ceilings("T4", "float16", 65e12, 320e9, _NVIDIA),
        Ceilings("T4", "float32", 8.1e12, 320e9, _NVIDIA),
        Ceilings("A100 80GB SXM", "bfloat16", 312e12, 2039e9, _NVIDIA),
        Ceilings("A100 80GB SXM", "float32", 19.5e12, 2039e9, _NVIDIA),
        Ceilings("H100 SXM", "bfloat16", 989e12, 3350e9, _NVIDIA),
        Ceilings("H100 SXM", "float32", 67e12, 3350e9, _NVIDIA),
        Ceilings("H200 SXM", "bfloat16", 989e12, 4800e9, _NVIDIA),
        Ceilings("H200 SXM", "float32", 67e12, 4800e9, _NVIDIA),
        # 96 cores × 2.4 GHz (base) × 2 FMA units of 8 float32 numbers; 12 channels of DDR5-4800.
        Ceilings("EPYC 9654 CPU", "float32", 7.4e12, 460.8e9, "AMD's data sheet, computed at the base clock"),
        Ceilings("EPYC 9654 CPU", "bfloat16", 14.7e12, 460.8e9, "AMD's data sheet, computed at the base clock"),
    )
}


def measure_ceilings(device: str = "auto", dtype: str = "auto") -> Ceilings:
    """Read much memory and multiply large matrices, each five times; the fastest counts: a ceiling is a maximum.

    Takes about a second. Raises HardwareError for a device or dtype that is not there.
    """
    where = hardware.choose_device(device).value
    kind = hardware.choose_dtype(where, dtype).value
    name = hardware.describe(where).device_name
    count = len(hardware.cores())
    if torch.device(where).type == "cpu":
        name += f", {count} core{'s' * (count > 1)}"
    return Ceilings(name, kind, _product_rate(where, getattr(torch, kind)), _read_rate(where), "measured here")


def timed(run: Callable[[], object], device: str, repeats: int = _REPEATS) -> list[float]:
    """Seconds of each of `repeats` runs, after one that warms up; the host's part and its waiting included."""
    on_gpu = torch.device(device).type == "cuda"
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _fastest(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of some runs: on a GPU one behind the other, by its own clock, as phases are timed."""
    if torch.device(device).type == "cpu":
        return min(timed(run, device))
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    for event in events[:-1]:
        event.record()
        run()
    events[-1].record()
    events[-1].synchronize()
    return float(min(before.elapsed_time(after) for before, after in pairwise(events))) / 1e3


def _read_rate(device: str) -> float:
    wanted = _READ_BYTES[torch.device(device).type]
    nbytes = min(wanted, hardware.free_memory_bytes(device) // 4)
    buffer = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    return nbytes / _fastest(buffer.sum, device)


def _product_rate(device: str, dtype: torch.dtype) -> float:
    side = _SIDE[torch.device(device).type]
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / _fastest(lambda: linear(a, b), device)
