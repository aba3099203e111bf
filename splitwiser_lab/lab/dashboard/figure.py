"""The live view as one plotly figure: made once, then only its data change.

All traces, lines at flips and their names exist from the start, because nothing may be added or removed while it is
live; a frame only says what they hold. Works with plotly 5 and later, as a Figure and as a FigureWidget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plotly.subplots import make_subplots

from splitwiser_lab.lab.dashboard import series
from splitwiser_lab.lab.dashboard.figure_style import (
    KV_COLOUR,
    LINE_COLOURS,
    LINE_DASHES,
    NO_READINGS,
    TITLES,
)
from splitwiser_lab.lab.dashboard.frame import Frame, Line
from splitwiser_lab.lab.lane_rows import lane_order
from splitwiser_lab.lab.palette import FAINT, INK, PAPER, PHASE_COLOURS, PHASE_LABELS
from splitwiser_lab.lab.thinning import Bar

HEIGHT = 640
_FLIPS = 4  # that are marked at once
_PANELS = (("x", "y domain"), ("x2", "y2 domain"), ("x3", "y4 domain"), ("x4", "y5 domain"), ("x5", "y6 domain"))
_NAMED = (0, 4)  # panels in which a flip is marked with its name
_READABLE = 0.14  # share of the width that a name needs


@dataclass(frozen=True)
class Change:
    """What one frame changes in the figure: the data of each trace, and properties of the layout."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]


def build(kind: Any, lines: Sequence[Line]) -> Any:
    """An empty figure of this class (`go.Figure` or `go.FigureWidget`) for these lines of hardware."""
    specs: list[list[dict[str, Any] | None]] = [[{}, {"secondary_y": True}], [{}, {}], [{"colspan": 2}, None]]
    spacing = {"vertical_spacing": 0.11, "horizontal_spacing": 0.11, "row_heights": [0.34, 0.34, 0.32]}
    figure = kind(make_subplots(3, 2, specs=specs, subplot_titles=list(TITLES), **spacing))
    for line, colour, dash in zip(lines, LINE_COLOURS, LINE_DASHES, strict=False):
        figure.add_scatter(**_line(line.label, colour, dash, "%{y:.0f} %"), xaxis="x", yaxis="y")
    for phase, y in (("prefill", "y2"), ("decode", "y3")):
        style = _line(phase, PHASE_COLOURS[phase], "solid", "%{y:,.0f} tok/s")  # type: ignore[index]
        figure.add_scatter(**style, xaxis="x2", yaxis=y, showlegend=False, line_shape="hvh")
    figure.add_scatter(
        name="ITL",
        xaxis="x3",
        yaxis="y4",
        mode="markers",
        marker={"color": PHASE_COLOURS["decode"], "size": 4, "opacity": 0.8},
        hovertemplate="%{y:.1f} ms<extra>ITL</extra>",
    )
    figure.add_scatter(**_line("ITL p99", INK, "solid", "%{y:.1f} ms"), xaxis="x3", yaxis="y4")
    figure.add_scatter(
        **_line("KV", KV_COLOUR, "solid", "%{y:.1f} %"), xaxis="x4", yaxis="y5", showlegend=False, line_shape="hv"
    )
    for phase_, colour in PHASE_COLOURS.items():
        figure.add_bar(
            **{"name": PHASE_LABELS[phase_], "orientation": "h", "xaxis": "x5", "yaxis": "y6", "width": 0.8},
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.add_scatter(
        **{"name": "hand-off", "mode": "markers", "xaxis": "x5", "yaxis": "y6"},
        marker={"symbol": "diamond", "size": 7, "color": INK},
        hovertemplate="%{text}<extra></extra>",
    )
    _style(figure)
    return figure


def change(frame: Frame) -> Change:
    """What has to change for `frame` to be seen."""
    zoom = series.zoom(frame)
    bars, handed = series.bars(frame, zoom)
    lanes = lane_order(bar.lane for bar in bars)
    traces = [_xy(series.hardware(frame, line.key)) for line in frame.lines]
    traces += [_xy(series.rate(frame, phase)) for phase in ("prefill", "decode")]
    traces += [_xy(series.gaps(frame)), _xy(series.p99(frame)), _xy(series.kv_use(frame))]
    traces += [_bars([bar for bar in bars if bar.phase == phase], lanes) for phase in PHASE_COLOURS]
    below = -len(lanes) + 0.15
    moments = [round(moment, 4) for moment, _ in handed]
    traces.append({"x": moments, "y": [below] * len(handed), "text": [text for _, text in handed]})
    return Change(traces, _layout(frame, zoom, lanes, traces[len(frame.lines) + 2]["y"]))


def apply(figure: Any, new: Change) -> None:
    """Make the change, in one message if the figure is a widget."""
    with figure.batch_update():
        for trace, data in zip(figure.data, new.traces, strict=True):
            trace.update(data)
        figure.update_layout(new.layout)


def _layout(frame: Frame, zoom: float, lanes: list[str], gaps: list[float]) -> dict[str, Any]:
    window, close = ([round(edge, 4) for edge in frame.last(seconds)] for seconds in (frame.window, zoom))
    names = {-float(row): lane for row, lane in enumerate(lanes)}
    names |= {-len(lanes) + 0.15: "hand-off"} if lanes else {}
    layout: dict[str, Any] = {f"xaxis{n}": {"range": window} for n in ("", 2, 3, 4)}
    layout["xaxis5"] = {"range": close}
    layout["yaxis4"] = {"range": log_range(gaps)}
    layout["yaxis6"] = {
        "range": [-len(lanes) - 0.2, 0.95] if lanes else [0, 1],
        "tickvals": list(names),
        "ticktext": list(names.values()),
    }
    flips = frame.flips[-_FLIPS:]
    layout["shapes"] = [
        _mark(flips[i][0] if i < len(flips) else None, close if panel == 4 else window)
        for panel in range(len(_PANELS))
        for i in range(_FLIPS)
    ]
    names_at = [_name(flips, i, close if panel == 4 else window) for panel in _NAMED for i in range(_FLIPS)]
    titles: list[dict[str, Any]] = [{"text": TITLES[0] if frame.lines else NO_READINGS}, {}, {}, {}]
    titles.append({"text": f"{TITLES[-1]}, the last {zoom:.3g} s"})
    layout["annotations"] = [*titles, *names_at]
    return layout


def log_range(values: list[float]) -> list[float]:
    """A range for a logarithmic axis that holds these values, in steps that do not jump about all the time."""
    positive = [value for value in values if value and value > 0]
    if not positive:
        return [0.0, 3.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    return [math.floor(low * 3 - 0.3) / 3, math.ceil(high * 3 + 0.3) / 3]


def _mark(moment: float | None, shown: list[float]) -> dict[str, Any]:
    visible = moment is not None and shown[0] < moment < shown[1]
    return {"visible": visible, **({"x0": round(moment, 4), "x1": round(moment, 4)} if visible and moment else {})}


def _name(flips: list[tuple[float, str]], i: int, shown: list[float]) -> dict[str, Any]:
    """The name of a flip's new mode, left out where the next flip follows too closely for it to be read."""
    if i >= len(flips) or not shown[0] < flips[i][0] < shown[1]:
        return {"visible": False}
    until = flips[i + 1][0] if i + 1 < len(flips) else shown[1] + shown[1] - shown[0]
    readable = until - flips[i][0] > _READABLE * (shown[1] - shown[0])
    return {"visible": readable, "x": round(flips[i][0], 4), "text": flips[i][1]}


def _xy(points: series.Points) -> dict[str, Any]:
    return {"x": points[0], "y": points[1]}


def _bars(bars: list[Bar], lanes: list[str]) -> dict[str, Any]:
    return {
        "y": [-lanes.index(bar.lane) for bar in bars],
        "base": [round(bar.start, 4) for bar in bars],
        "x": [round(bar.end - bar.start, 5) for bar in bars],
        "customdata": [bar.tooltip for bar in bars],
    }


def _line(name: str, colour: str, dash: str, shown: str) -> dict[str, Any]:
    return {
        "name": name,
        "mode": "lines",
        "line": {"color": colour, "dash": dash, "width": 2},
        "hovertemplate": f"{shown}<extra>{name}</extra>",
        "connectgaps": False,
    }


def _style(figure: Any) -> None:
    figure.update_layout(
        template="none",
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        font={"color": INK, "size": 12},
        height=HEIGHT,
        autosize=True,
        margin={"l": 64, "r": 56, "t": 34, "b": 64},
        legend={"orientation": "h", "x": 0, "y": -0.09, "yanchor": "top"},
        barmode="overlay",
        bargap=0,
        uirevision="live",
        hovermode="closest",
    )
    figure.update_annotations(font_size=13)
    axes = {"gridcolor": FAINT, "linecolor": FAINT, "tickcolor": FAINT, "zeroline": False}
    figure.update_xaxes(**axes, ticksuffix=" s", nticks=6)
    figure.update_yaxes(**axes, rangemode="tozero", nticks=5)
    figure.update_layout(yaxis={"range": [0, 125], "tickvals": [0, 50, 100]}, yaxis6_showgrid=False)
    figure.update_layout(yaxis4={"type": "log", "dtick": "D2", "rangemode": "normal", "tickformat": ",.3~r"})
    for axis, phase in (("yaxis2", "prefill"), ("yaxis3", "decode")):
        swatch = f'<span style="color:{PHASE_COLOURS[phase]}">■</span>'  # type: ignore[index]
        title = {"text": f"{swatch} {phase}", "standoff": 4}
        ticks = {"tickformat": ",.3~r", "tickmode": "auto", "nticks": 5}
        figure.update_layout({axis: {"title": title, **ticks}})
    figure.update_layout(yaxis3={"overlaying": "y2", "side": "right", "anchor": "x2", "showgrid": False})
    for x, y in _PANELS:
        for _ in range(_FLIPS):
            mark = {"type": "line", "xref": x, "yref": y, "y0": 0, "y1": 1, "x0": 0, "x1": 0, "visible": False}
            figure.add_shape(**mark, line={"color": INK, "dash": "dash", "width": 1.5})
    for panel in _NAMED:
        x, y = _PANELS[panel]
        for _ in range(_FLIPS):
            place = {"xref": x, "yref": y, "x": 0, "y": 1, "xanchor": "left", "yanchor": "top", "showarrow": False}
            figure.add_annotation(**place, text="", visible=False, font={"size": 11}, xshift=2)
