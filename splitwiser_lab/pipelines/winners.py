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
    base = next((value for row, value in known if row.name == BASE), None)
    if not base:
        return None
    row, value = (min if figure.endswith("_ms") else max)(known, key=lambda pair: pair[1])
    return row, value / base


def _best(rows: Sequence[Row], figure: str) -> str:
    found = best_row(rows, figure)
    if found is None:
        return ""
    row, times = found
    if figure == "over_sequential":  # a machine drifts between rounds: the quotient of the medians is another number
        return f"{row.name} ({times:.2f})"
    beside = f", {times:.2f} × {BASE}'s" if figure in _ONE_BY_ONE and row.name != BASE else ""
    return f"{row.name} ({row.figure(figure):,.1f}{beside})"
