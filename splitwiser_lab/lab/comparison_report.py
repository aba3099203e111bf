"""A comparison as an HTML report: table, Gantt of each mode, texts, and the losses in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from splitwiser_lab.lab.report import write_report
from splitwiser_lab.measure.compare import Comparison
from splitwiser_lab.measure.reference import TokenCheck

_MATTERS = 1.05  # a difference below five per cent is not called a loss


def report_comparison(path: str | Path, title: str, found: Comparison, prompts: Sequence[str]) -> Path:
    """Write the report of `found` to `path` and return the path. Raises OSError when it cannot be written."""
    first = found.runs[0].results[-1]
    texts = [
        {
            "prompt": prompt,
            "text": first.texts[number],
            "identical": {run.mode: _state([checks[number] for checks in run.checks]) for run in found.runs},
            "texts": {run.mode: run.results[-1].texts[number] for run in found.runs},
        }
        for number, prompt in enumerate(prompts)
    ]
    timelines = {run.mode: run.results[-1].timeline for run in found.runs}
    return write_report(path, title, _facts(found), found.rows(), timelines, texts, notes(found))


def notes(found: Comparison) -> list[str]:
    """What a reader should not overlook: where a mode loses to `sequential` (or to the first), and by how much."""
    base, *others = found.runs
    said = [f"Every figure is the median of {len(base.results)} interleaved repeats, with the lowest and highest."]
    said.append(f"Tokens are compared with {found.reference}, one request at a time.")
    if found.disturbed:
        said.append(f"Not to be believed: {found.disturbed}")
    for run in others:
        ours, theirs = run.samples(), base.samples()
        for figure, name, more_is_better in (
            ("median_ttft_ms", "median TTFT", False),
            ("median_tpot_ms", "median TPOT", False),
            ("max_itl_ms", "longest gap between tokens", False),
            ("output_throughput", "output throughput", True),
        ):
            if figure not in ours or figure not in theirs:
                continue
            ratio = median(ours[figure]) / median(theirs[figure])
            worse = 1 / ratio if more_is_better else ratio
            if worse > _MATTERS:
                said.append(f"{run.mode} loses to {base.mode} in {name}: {worse:.2f} times worse.")
            elif worse < 1 / _MATTERS:
                said.append(f"{run.mode} beats {base.mode} in {name}: {1 / worse:.2f} times better.")
    return said


def _facts(found: Comparison) -> dict[str, Any]:
    machine = found.origin["hardware"]
    return {
        "model": found.model,
        "device": machine["device_name"],
        "cores": machine["cores"],
        "memory": f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "system": machine["system"],
        "versions": found.origin["versions"],
        "command": found.origin["command"],
        "commit": found.origin["commit"],
        "time": found.origin["time_utc"],
    }


def _state(checks: Sequence[TokenCheck]) -> bool | str:
    different = [check for check in checks if not check.identical]
    if not different:
        return True
    return str(different[0]) if all(check.explained for check in different) else False
