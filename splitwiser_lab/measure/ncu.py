"""Nsight Compute (`ncu`): the command that counts what each kernel of a phase does, and a reader of its CSV.

It replays every kernel several times, so that its times are not those of a run: it tells how much of the SMs and of
the memory bandwidth each kernel uses. Only a driver that lets ordinary users read its counters allows it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitwiser_lab.errors import RecordingError
from splitwiser_lab.timeline import Phase

_SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
_DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
_TIME = "gpu__time_duration.sum"
_SECONDS = {"second": 1.0, "s": 1.0, "msecond": 1e-3, "ms": 1e-3, "usecond": 1e-6, "us": 1e-6}
_SECONDS |= {"nsecond": 1e-9, "ns": 1e-9}
_COLUMNS = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")


@dataclass(frozen=True)
class KernelCounts:
    """A kernel's run, or several: seconds on the GPU, and throughputs in percent of the peak."""

    name: str
    seconds: float
    sm_percent: float
    dram_percent: float


def ncu_command(phase: Phase, csv_file: str, words: Sequence[str] = ()) -> list[str]:
    """The command that profiles one pass of `phase` of the Hugging Face pipeline into `csv_file`.

    `words` are options of `splitwiser-lab reproduce` that choose the work.
    """
    ncu = ["ncu", "--nvtx", "--nvtx-include", f"{phase}/", "--clock-control", "none"]
    ncu += ["--metrics", ",".join((_SM, _DRAM, _TIME)), "--csv", "--log-file", csv_file]
    return [*ncu, "splitwiser-lab", "reproduce", "--only-phases", "--phase-seconds", "0", *words]


def read_ncu(path: str | Path) -> list[KernelCounts]:
    """The kernels of a CSV that `ncu_command` made, in order; lines before its heading are skipped.

    Raises RecordingError when it holds no kernel (with what ncu said instead), or lacks a metric.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((number for number, line in enumerate(lines) if all(f'"{c}"' in line for c in _COLUMNS)), None)
    if start is None:
        said = [line for line in lines if line.startswith("==")]
        raise RecordingError(
            f"{path} holds no kernel: {said[-1].strip('= ') if said else 'it is no CSV of ncu'}. Where the counters "
            "are forbidden (ERR_NVGPUCTRPERM), an administrator has to allow them."
        )
    found: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for row in csv.DictReader(lines[start:]):
        metric = row["Metric Name"]
        if metric in (_SM, _DRAM, _TIME):
            names[row["ID"]] = row["Kernel Name"]
            found.setdefault(row["ID"], {})[metric] = _value(row, path)
    for number, values in found.items():
        if lacking := {_SM, _DRAM, _TIME} - set(values):
            raise RecordingError(
                f"{path}: kernel {number} ({names[number]}) has no {', '.join(sorted(lacking))}: profile it again with "
                "the command that ncu_command gives."
            )
    return [KernelCounts(names[n], values[_TIME], values[_SM], values[_DRAM]) for n, values in found.items()]


def summed(kernels: Sequence[KernelCounts]) -> KernelCounts:
    """All kernels as one, their throughputs as means weighted by time. Raises RecordingError when there are none."""
    seconds = sum(kernel.seconds for kernel in kernels)
    if not seconds:
        raise RecordingError("there are no kernels to sum up: profile a phase that runs some.")
    sm = sum(kernel.sm_percent * kernel.seconds for kernel in kernels) / seconds
    dram = sum(kernel.dram_percent * kernel.seconds for kernel in kernels) / seconds
    return KernelCounts(f"all {len(kernels)} kernels", seconds, sm, dram)


def _value(row: dict[str, str], path: str | Path) -> float:
    """A number, thousands apart or not; a time in seconds."""
    text, unit = row["Metric Value"].replace(",", ""), row["Metric Unit"]
    try:
        return float(text) * (_SECONDS[unit] if row["Metric Name"] == _TIME else 1.0)
    except (ValueError, KeyError) as error:
        raise RecordingError(
            f"{path}: kernel {row['ID']} ({row['Kernel Name']}) has {text!r} {unit} for {row['Metric Name']}, which is "
            "no figure: this GPU does not count it."
        ) from error
