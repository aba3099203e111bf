"""The suite's results as tables for a terminal: one per section and shape, and the figures to reach at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from splitwiser_lab.measure.gpu_suite.join import Joined
    from splitwiser_lab.measure.gpu_suite.suite import Suite

Row = dict[str, Any]
_TOKENS: dict[str, tuple[str, int, float]] = {
    "mode": ("mode", 0, 1),
    "requests": ("requests", 0, 1),
    "differ from sequential's": ("differ", 0, 1),
    "read by transformers": ("looked_at", 0, 1),
    "worst token: logits apart": ("largest_gap", 4, 1),
    "dtype tells apart": ("resolution_there", 4, 1),
    "texts explained": ("explained", 0, 1),
}
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
    "kernels": {
        "phase": ("phase", 0, 1),
        "batch": ("batch", 0, 1),
        "tokens": ("tokens", 0, 1),
        "lengths": ("lengths", 0, 1),
        "ms": ("ms", 3, 1),
        "products": ("products_ms", 3, 1),
        "attention": ("attention_ms", 3, 1),
        "rest": ("rest_ms", 3, 1),
        "idle": ("idle_ms", 3, 1),
        "products, % of ceiling": ("products_share", 0, 100),
        "attention, % of ceiling": ("attention_share", 0, 100),
        "ms unprofiled": ("undisturbed_ms", 3, 1),
    },
    "overlap": {
        "load": ("load", 0, 1),
        "mode": ("mode", 0, 1),
        "overlap gain": ("gain", 2, 1),
        "at most": ("limit", 2, 1),
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
        "% good": ("good_share", 0, 100),
        "idle max ms": ("max_idle_ms", 0, 1),
        "tokens as sequential": ("tokens_as_sequential", 2, 1),
    },
    "peers": {
        "who": ("peer", 0, 1),
        "output tok/s": ("output_tok_s", 0, 1),
        "ours / theirs": ("ours_over_theirs", 2, 1),
        "tokens as ours": ("tokens_as_ours", 0, 1),
        "how": ("settings", 0, 1),
    },
    "hostbound": {
        "processes": ("processes", 0, 1),
        "sharing": ("sharing", 0, 1),
        "output": ("output", 0, 1),
        "output tok/s": ("output_tok_s", 0, 1),
        "× one process": ("over_one_process", 2, 1),
    },
}


def tables(suite: Suite | Joined) -> Iterator[Table]:
    """A table for each section and shape that has rows, then what was left out, then the figures to reach."""
    from rich.table import Table

    found = suite.to_dict()
    caption = f"median (lowest–highest) of up to {found['repeats']} interleaved repeats; {found['dtype']}"
    limits = found["limits"]
    good = f"goodput: TTFT within {limits['ttft_ms']:g} ms and p99 ITL within {limits['itl_ms']:g} ms, per request"
    captions = {
        "sweep": f"{caption}; {good}",
        "overlap": f"{caption}; at most: each phase alone on its part of the device, once",
        "kernels": f"ms of a batch, mean under the profiler, and median without it a moment before; {found['dtype']}",
    }
    for section, shapes in found["sections"].items():
        for shape, part in shapes.items():
            weights = ", random weights" if shape in found["random_weights"] or section == "hostbound" else ""
            tokens = [row for row in part["rows"] if row.get("part") == "tokens"]
            figures = [row for row in part["rows"] if row.get("part") != "tokens"]
            figures.sort(key=lambda row: row.get("fraction") or 0.0)  # a row of more rounds came later
            for what, columns, rows in ((section, _COLUMNS[section], figures), ("tokens", _TOKENS, tokens)):
                if rows:
                    title = f"where the time goes, kernels: {shape}" if what == "kernels" else f"{what}: {shape}"
                    yield _table(f"{title}{weights}", captions.get(what, caption), columns, rows)
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
    table = Table("figure", "shape", "to reach", "measured", "verdict", "what bounds it", title="figures to reach")
    for verdict in suite.verdicts():
        table.add_row(verdict.figure, verdict.shape, verdict.target, verdict.measured, verdict.word, verdict.bound)
    yield table


def _table(title: str, caption: str, columns: dict[str, tuple[str, int, float]], rows: list[Row]) -> Table:
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for heading in columns:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(_cell(row, *column) for column in columns.values()))
    return table


def _cell(row: Row, entry: str, digits: int, factor: float) -> str:
    value = row.get(entry)
    if value is None:
        return "–"
    if isinstance(value, dict):
        low, middle, high = (f"{value[key] * factor:.{digits}f}" for key in ("low", "median", "high"))
        return middle if low == high else f"{middle} ({low}–{high})"
    return f"{value * factor:.{digits}f}" if isinstance(value, float) else str(value)
