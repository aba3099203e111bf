"""What a chart with two logarithmic axes shows, drawn twice: as a small SVG without any library, and by plotly.

Both have the same series in the same colours: hollow marks are predictions, filled ones measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from splitwiser_lab.lab.palette import INK
from splitwiser_lab.lab.svg import page

_WIDTH, _HEIGHT = 760, 380  # of the plot with its axes, in pixels
_LEFT, _RIGHT, _BELOW = 78, 26, 46
_LETTER = 6.4  # width in pixels, on average, at 12 pixels height
_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y), both above 0. `notes` says more of each, where a pointer rests on it; `label` stands at the last.

    A series without a `name` is not in the legend.
    """

    name: str
    colour: str
    points: tuple[tuple[float, float], ...]
    line: Literal["solid", "dash", "none"] = "solid"
    marks: Literal["filled", "hollow", "none"] = "none"
    notes: tuple[str, ...] = ()
    label: str = ""
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Titles with units, series in the order in which they are drawn, and a sentence for who cannot see them."""

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    described: str

    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Lowest and highest x and y of all points, with a little room around. Raises ValueError for no point."""
        points = [point for series in self.series for point in series.points]
        if not points:
            raise ValueError("there is no point to draw")
        spans = []
        for values in zip(*points, strict=True):
            low, high = math.log10(min(values)), math.log10(max(values))
            room = max(0.06 * (high - low), 0.1)
            spans.append((10 ** (low - room), 10 ** (high + room)))
        return spans[0], spans[1]


def si(value: float, digits: int = 3) -> str:
    """A number with the prefix of its size: 34.2 G, 512, 1.5 k."""
    if value == 0:
        return "0"
    power = min(15, max(-9, 3 * math.floor(math.log10(abs(value)) / 3)))
    return f"{value / 10.0**power:.{digits}g} {_PREFIXES[power]}".strip()


def chart_svg(chart: Chart) -> str:
    """The chart as an SVG that fits light and dark pages. Raises ValueError when there is nothing to draw."""
    return _Drawing(chart).svg()


class _Drawing:
    """Lays out title, legend and plot from top to bottom."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.x_range, self.y_range = chart.ranges()
        self.parts: list[str] = []
        self.top = 0.0

    def svg(self) -> str:
        self._heading()
        self._axes()
        for series in self.chart.series:
            self._series(series)
        title, described = self.chart.title, self.chart.described
        return page("chart", _WIDTH, self.top + _HEIGHT, title, described, self.parts)

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _share(value, self.x_range)

    def y(self, value: float) -> float:
        return self.top + 10 + (_HEIGHT - 10 - _BELOW) * (1 - _share(value, self.y_range))

    def _text(self, x: float, y: float, text: str, anchor: str = "start", more: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>')

    def _heading(self) -> None:
        self._text(_LEFT, 18, self.chart.title, more=' font-size="14" font-weight="600"')
        x, y = float(_LEFT), 40.0
        for series in self.chart.series:
            wide = 48 + _LETTER * len(series.name)
            if not series.name:
                continue
            if x + wide > _WIDTH:
                x, y = float(_LEFT), y + 18
            if series.line != "none":
                self.parts.append(_path([(x, y - 4), (x + 22, y - 4)], series))
            if series.marks != "none":
                self.parts.append(_mark(x + 11, y - 4, series, ""))
            self._text(x + 28, y, series.name)
            x += wide
        self.top = y + 6

    def _axes(self) -> None:
        (left, right), (low, high) = self.x_range, self.y_range
        lines = ""
        for value in log_ticks(left, right):
            lines += f"M{self.x(value):.1f} {self.y(high):.1f}V{self.y(low):.1f}"
            self._text(self.x(value), self.y(low) + 17, si(value), "middle", ' font-size="11"')
        for value in log_ticks(low, high):
            lines += f"M{self.x(left):.1f} {self.y(value):.1f}H{self.x(right):.1f}"
            self._text(_LEFT - 8, self.y(value) + 4, si(value), "end", ' font-size="11"')
        self.parts.append(f'<path d="{lines}" stroke="{INK}" stroke-opacity="0.25"/>')
        self._text((_LEFT + _WIDTH - _RIGHT) / 2, self.y(low) + 37, self.chart.x_title, "middle")
        middle = (self.y(low) + self.y(high)) / 2
        self._text(16, middle, self.chart.y_title, "middle", f' transform="rotate(-90 16 {middle:.1f})"')

    def _series(self, series: Series) -> None:
        at = [(self.x(x), self.y(y)) for x, y in series.points]
        if series.line != "none" and len(at) > 1:
            self.parts.append(_path(at, series))
        if series.marks != "none":
            notes = series.notes or ("",) * len(at)
            self.parts += [_mark(x, y, series, note) for (x, y), note in zip(at, notes, strict=True)]
        if series.label:
            x, y = at[-1]
            more = f' font-size="11" fill="{series.colour}"'
            if x + 10 + _LETTER * len(series.label) < _WIDTH:
                self._text(x + 9, y + 4, series.label, more=more)
            else:
                self._text(min(x, _WIDTH - 4), y - 7, series.label, "end", more)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`: powers of ten, with 2 and 5 where there are few, by 100 where many."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**power for power in range(first, last + 1)]
    if len(powers) > 8:
        return powers[::2]
    if len(powers) >= 3:
        return powers
    return [
        value
        for power in range(first - 1, last + 1)
        for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if low <= value <= high
    ]


def chart_figure(chart: Chart) -> Any:
    """The chart as a plotly figure. Raises ValueError when there is nothing to draw."""
    import plotly.graph_objects as go

    from splitwiser_lab.lab.plot_style import style

    figure = go.Figure()
    for series in chart.series:
        figure.add_trace(trace(series))
    style(figure, chart.title, height=480)
    axes = zip((figure.update_xaxes, figure.update_yaxes), (chart.x_title, chart.y_title), chart.ranges(), strict=True)
    for update, text, ends in axes:
        marks = log_ticks(*ends)
        update(title_text=text, type="log", range=[math.log10(end) for end in ends])
        update(tickvals=marks, ticktext=[si(mark) for mark in marks])
    return figure


def trace(series: Series) -> Any:
    """One series as a plotly trace."""
    import plotly.graph_objects as go

    parts = ["lines"] * (series.line != "none") + ["markers"] * (series.marks != "none") + ["text"] * bool(series.label)
    hollow = series.marks == "hollow"
    labelled = [""] * (len(series.points) - 1) + [series.label] if series.label else None
    return go.Scatter(
        name=series.name,
        showlegend=bool(series.name),
        x=[x for x, _ in series.points],
        y=[y for _, y in series.points],
        mode="+".join(parts),
        text=list(series.notes) or labelled,
        textposition="top left",
        hovertemplate="%{text}<extra></extra>" if series.notes else "%{x:.3s}, %{y:.3s}<extra></extra>",
        line={
            "color": series.colour,
            "dash": "dash" if series.line == "dash" else "solid",
            "width": 1 + (not series.faint),
        },
        marker={
            **{"symbol": "circle-open" if hollow else "circle", "size": 14 if hollow else 8},
            **{"color": series.colour, "line": {"width": 2, "color": series.colour}},
        },
        opacity=0.6 if series.faint else 1.0,
    )


def _share(value: float, ends: Sequence[float]) -> float:
    return math.log(value / ends[0]) / math.log(ends[1] / ends[0])


def _path(at: Sequence[tuple[float, float]], series: Series) -> str:
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    dash = ' stroke-dasharray="5 4"' if series.line == "dash" else ""
    wide = 'stroke-width="1" stroke-opacity="0.6"' if series.faint else 'stroke-width="2"'
    return f'<path d="{line}" fill="none" stroke="{series.colour}" {wide}{dash}/>'


def _mark(x: float, y: float, series: Series, note: str) -> str:
    fill = "none" if series.marks == "hollow" else series.colour
    # A prediction is a ring around what was measured, if it was right.
    size = 7 if series.marks == "hollow" else 4
    mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{fill}" stroke="{series.colour}" stroke-width="2"'
    return f"{mark}><title>{escape(note)}</title></circle>" if note else f"{mark}/>"
