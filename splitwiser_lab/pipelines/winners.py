"""Which placement of engines was best at what, in sentences: where the paper's idea pays, and where it does not."""

from __future__ import annotations

from collections.abc import Sequence

from splitwiser_lab.pipelines.rows import BASE, Row

_PLACEMENTS = ("sequential", "replicas", "split")  # the modes of a pipeline, apart from what runs beside it
_AT_ONCE = {
    "over_sequential": f"largest multiple of {BASE} in the same rounds",
    "output_throughput": "most output tok/s",
}
_ONE_BY_ONE = {
    "median_ttft_ms": "shortest TTFT p50",
    "p99_ttft_ms": "shortest TTFT p99",
    "p99_itl_ms": "shortest ITL p99",
}


def winners(rows: Sequence[Row]) -> list[str]:
    """A sentence for each output length and way of arriving: who was best, and how much against `sequential`."""
    found = []
    for output, rate in dict.fromkeys((row.output, row.rate) for row in rows):
        those = [row for row in rows if (row.output, row.rate) == (output, rate) and row.mode in _PLACEMENTS]
        figures = _AT_ONCE if rate is None else _ONE_BY_ONE
        told = [f"{what} {said}" for figure, what in figures.items() if (said := _best(those, figure))]
        when = "all at once" if rate is None else f"{rate:.3g} arrivals/s"
        if told:
            found.append(f"{output} new tokens, {when}: {'; '.join(told)}.")
    return found


def best_row(rows: Sequence[Row], figure: str) -> tuple[Row, float] | None:
    """The row with the best median of a figure (of times the least), and its multiple of `sequential`'s.

    None where nobody, or not `sequential`, has the figure.
    """
    known = [(row, value) for row in rows if (value := row.figure(figure)) is not None]
    base = next((row for row, _ in known if row.name == BASE), None)
    if base is None:
        return None
    row, _ = (min if figure.endswith("_ms") else max)(known, key=lambda pair: pair[1])
    times = multiple(row, base, figure)
    return None if times is None else (row, times)


def multiple(row: Row, base: Row | None, figure: str) -> float | None:
    """A row's figure as a multiple of `sequential`'s on the same work; None where either was not measured.

    Of the throughput it is the median over the rounds, each compared with the `sequential` of its own round, since a
    machine drifts from one to the next; of other figures it is the quotient of the medians.
    """
    if figure == "output_throughput":
        return row.figure("over_sequential")
    ours, theirs = row.figure(figure), base.figure(figure) if base else None
    return ours / theirs if ours and theirs else None


def _best(rows: Sequence[Row], figure: str) -> str:
    found = best_row(rows, figure)
    if found is None:
        return ""
    row, times = found
    value = row.figure(figure) or 0.0
    told = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if figure in _AT_ONCE else f"{value:.4g}"
    beside = f", {times:.2f} × {BASE}'s" if figure in _ONE_BY_ONE and row.name != BASE else ""
    return f"{row.name} ({told}{beside})"
