"""The suite's results as tables for a terminal: one per section and shape, and the figures to reach at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from splitwiser_lab.measure.gpu_suite.suite import Suite

Row = dict[str, Any]
_COLUMNS: dict[str, dict[str, tuple[str, int, float]]] = {  # section: heading -> (entry, digits, factor)
    "efficiency": {
        "phase": ("phase", 0, 1),
        "batch": ("batch", 0, 1),
        "tokens": ("tokens", 0, 1),
        "lengths": ("lengths", 0, 1),
        "ms": ("ms", 3, 1),
        "T/s": ("rate", 2, 1e-12),
        "% of ceiling": ("share", 0, 100),
    },
    "overlap": {
        "load": ("load", 0, 1),
        "mode": ("mode", 0, 1),
        "overlap gain": ("gain", 2, 1),
        "decode step × alone": ("decode_slowdown", 2, 1),
        "prefill share": ("prefill_share", 2, 1),
    },
    "sweep": {
        "of capacity": ("fraction", 2, 1),
        "requests/s": ("rate", 2, 1),
        "mode": ("mode", 0, 1),
        "TTFT p50 ms": ("median_ttft_ms", 0, 1),
        "TTFT p99 ms": ("p99_ttft_ms", 0, 1),
        "ITL p50 ms": ("median_itl_ms", 1, 1),
        "ITL p99 ms": ("p99_itl_ms", 1, 1),
        "ITL max ms": ("max_itl_ms", 0, 1),
        "output tok/s": ("output_throughput", 0, 1),
        "goodput/s": ("goodput", 2, 1),
        "tokens as sequential": ("tokens_as_sequential", 2, 1),
    },
    "peers": {
        "who": ("peer", 0, 1),
        "output tok/s": ("output_tok_s", 0, 1),
        "ours / theirs": ("ours_over_theirs", 2, 1),
        "tokens as ours": ("tokens_as_ours", 0, 1),
    },
    "hostbound": {
        "processes": ("processes", 0, 1),
        "sharing": ("sharing", 0, 1),
        "output": ("output", 0, 1),
        "output tok/s": ("output_tok_s", 0, 1),
        "× one process": ("over_one_process", 2, 1),
    },
}


def tables(suite: Suite) -> Iterator[Table]:
    """A table for each section and shape that has rows, then what was left out, then the figures to reach."""
    from rich.table import Table

    found = suite.to_dict()
    caption = f"median (lowest–highest) of up to {found['repeats']} interleaved repeats; {found['dtype']}"
    for section, shapes in found["sections"].items():
        for shape, part in shapes.items():
            if part["rows"]:
                weights = ", random weights" if shape in found["random_weights"] or section == "hostbound" else ""
                table = Table(title=f"{section}: {shape}{weights}", caption=caption)
                for heading in _COLUMNS[section]:
                    table.add_column(heading)
                for row in part["rows"]:
                    table.add_row(*(_cell(row, *column) for column in _COLUMNS[section].values()))
                yield table
    left_out = [
        (section, shape, item["what"], item["why"])
        for section, shapes in found["sections"].items()
        for shape, part in shapes.items()
        for item in part["left_out"]
    ]
    if left_out:
        table = Table("section", "shape", "what", "why", title="left out")
        for cells in left_out:
            table.add_row(*cells)
        yield table
    table = Table("figure", "shape", "to reach", "measured", "verdict", title="figures to reach")
    for verdict in suite.verdicts():
        table.add_row(verdict.figure, verdict.shape, verdict.target, verdict.measured, verdict.word)
    yield table


def _cell(row: Row, entry: str, digits: int, factor: float) -> str:
    value = row.get(entry)
    if value is None:
        return ""
    if isinstance(value, dict):
        low, middle, high = (f"{value[key] * factor:.{digits}f}" for key in ("low", "median", "high"))
        return middle if low == high else f"{middle} ({low}–{high})"
    return f"{value * factor:.{digits}f}" if isinstance(value, float) else str(value)
