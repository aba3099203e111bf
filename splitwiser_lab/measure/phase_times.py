"""Where the time of a phase goes on its device: kernel by kernel on a GPU, operator by operator on a CPU.

The profiler takes time itself, most of it between kernels: a batch is also timed without it, a moment before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.errors import HardwareError
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.measure.op_times import KINDS, by_kind, kind_of, op_times
from splitwiser_lab.measure.phase_rates import WARM_UP, run_batches
from splitwiser_lab.model.batch import Batch
from splitwiser_lab.predict.work import Work, parts_of, work

PRODUCTS, ATTENTION, REST = KINDS
_LONGEST, _NAME = 8, 160  # kernels or operators that are kept by name, and characters of it (templates have many)
_AHEAD = 2  # batches that the profiler sees but does not keep: its own start slows the first


@dataclass(frozen=True)
class Kernel:
    """Something that a GPU ran or copied, from `start` to `end`, in seconds on one clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of one batch under the profiler, and `undisturbed` without it; means and a median over `batches`.

    `idle` is when the device ran nothing; on a CPU it is not told apart from "everything else" and None.
    `longest` has the seconds of the longest kernels or operators.
    """

    batches: int
    seconds: float
    undisturbed: float
    by_kind: dict[str, float]
    idle: float | None
    longest: dict[str, float]
    work: Work

    def products_per_s(self, unit: str) -> float | None:
        """FLOP/s or B/s ("FLOP/s", "B/s") of the matrix products while they run: the work's least over their time."""
        return _per_second(sum(_amount(op, unit) for op in self.work.operators if op.rows), self.by_kind[PRODUCTS])

    def attention_per_s(self, unit: str) -> float | None:
        """The same of attention: keys and values, or the arithmetic on them."""
        return _per_second(_amount(self.work.of("attention"), unit), self.by_kind[ATTENTION])


def phase_times(engine: Engine, batches: Sequence[Batch]) -> PhaseTimes:
    """Run `batches` of one kind on a lane: some to warm up, half of the others undisturbed, half profiled.

    Raises HardwareError when the profiler saw no kernels.
    """
    half = (len(batches) - WARM_UP) // 2
    first, profiled = batches[: WARM_UP + half], batches[WARM_UP + half :]
    lane = engine.new_lane("inline", "phase")
    try:
        lane.start()
        ends = run_batches(lane, first)
        on_gpu = torch.device(engine.device).type == "cuda"
        seconds, kinds, idle, each = (_gpu_times if on_gpu else _cpu_times)(lane, profiled)
    finally:
        lane.close()
    count = len(profiled)
    longest = sorted(each.items(), key=lambda entry: -entry[1])[:_LONGEST]
    return PhaseTimes(
        batches=count,
        seconds=seconds / count,
        undisturbed=median(after - before for before, after in pairwise(ends[WARM_UP - 1 :])),
        by_kind={kind: spent / count for kind, spent in kinds.items()},
        idle=None if idle is None else idle / count,
        longest={name: spent / count for name, spent in longest},
        work=work(engine.config, parts_of(profiled[-1]), engine.dtype.itemsize),
    )


_Times = tuple[float, dict[str, float], float | None, dict[str, float]]  # in all, by kind, idle, by name


def _gpu_times(lane: Lane, batches: Sequence[Batch]) -> _Times:
    from torch.profiler import ProfilerActivity, profile, schedule

    steps = schedule(wait=0, warmup=1, active=1, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=steps) as profiler:
        run_batches(lane, batches[-_AHEAD:])
        profiler.step()
        run_batches(lane, batches)
    return times_of(kernels_of(profiler.events()))


def _cpu_times(lane: Lane, batches: Sequence[Batch]) -> _Times:
    begun = time.perf_counter()
    times = op_times(lambda: run_batches(lane, batches))
    seconds = time.perf_counter() - begun
    return seconds, by_kind(times, seconds), None, dict(times)


def kernels_of(events: Iterable[Any]) -> list[Kernel]:
    """What ran on the GPU among the profiler's events. Raises HardwareError when nothing did."""
    found = [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    if not found:
        raise HardwareError(
            "the profiler recorded no kernels: the driver may keep its counters from ordinary users, or another "
            "profiler is attached. Ask for the right to profile, or end the other one."
        )
    return found


def times_of(kernels: Sequence[Kernel]) -> _Times:
    """From the first start to the last end: seconds in all, of each kind, with nothing running, and by name."""
    kinds, each = dict.fromkeys(KINDS, 0.0), dict[str, float]()
    idle, until = 0.0, min(kernel.start for kernel in kernels)
    begun = until
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        kinds[kind_of(kernel.name)] += kernel.end - kernel.start
        name = kernel.name[:_NAME]
        each[name] = each.get(name, 0.0) + kernel.end - kernel.start
        idle += max(0.0, kernel.start - until)
        until = max(until, kernel.end)
    return until - begun, kinds, idle, each


def _amount(operator: Any, unit: str) -> float:
    return float(operator.flops if unit == "FLOP/s" else operator.bytes)


def _per_second(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None
