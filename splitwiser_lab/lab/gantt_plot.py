"""Gantts by plotly: which lane ran which phase when, for one run or for several over the same time axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from splitwiser_lab.lab.lane_rows import change_name, lane_order
from splitwiser_lab.lab.palette import INK, PHASE_COLOURS, PHASE_LABELS
from splitwiser_lab.lab.plot_style import marks, note, style
from splitwiser_lab.lab.static import shares
from splitwiser_lab.lab.thinning import Bar, thinned, thinning_note
from splitwiser_lab.timeline import Timeline

MOST_BARS = 2000
Window = tuple[float, float]


def gantt(timeline: Timeline, title: str | None = None, window: Window | None = None) -> go.Figure:
    """Lanes as rows, spans as bars coloured by phase; hand-offs, first tokens and mode changes marked.

    `window` is (start, end) in seconds: only what touches it is drawn. More than 2000 spans are thinned
    out, and a note below the axis says so.
    """
    return _gantts({"": timeline}, window, title)


def gantts(timelines: Mapping[str, Timeline], title: str | None = None, window: Window | None = None) -> go.Figure:
    """One Gantt per mode, one below the other over the same time axis. Raises ValueError for no timeline."""
    if not timelines:
        raise ValueError("there is no timeline to draw: give {mode: timeline}")
    return _gantts(timelines, window, title)


def _gantts(timelines: Mapping[str, Timeline], window: Window | None, title: str | None) -> go.Figure:
    start, end = window or (0.0, max((t.duration for t in timelines.values()), default=0.0) or 1e-3)
    if not end > start:
        raise ValueError(f"a window needs a positive length, got {start} to {end} s")
    rows = [max(1, len(t.lanes)) + (1.9 if t.requests else 1.0) for t in timelines.values()]
    titles = [" · ".join([f"<b>{name}</b>"] * bool(name) + shares(t) * (not window)) for name, t in timelines.items()]
    height = sum(34 * row for row in rows) + 52 * len(rows) + 90
    above = {"vertical_spacing": 0 if len(rows) == 1 else 46 / height, "subplot_titles": titles}
    figure = make_subplots(len(rows), 1, shared_xaxes=True, row_heights=rows, **above)
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    thinned_s, named = 0.0, set[str]()
    for row, timeline in enumerate(timelines.values(), start=1):
        inside = [span for span in timeline.spans if span.end >= start and span.start <= end]
        bars, shortest = thinned(inside, MOST_BARS // len(rows))
        thinned_s = max(thinned_s, shortest)
        for trace in _panel(timeline, bars, start, end):
            figure.add_trace(trace.update(showlegend=trace.name not in named), row=row, col=1)
            named.add(trace.name)
        upper, lower = _mark_rows(timeline)
        names = {-float(index): lane for index, lane in enumerate(lane_order(timeline.lanes))}
        names |= {upper: "hand-off", lower: "first token"} if timeline.requests else {}
        top = 1.1 if any(change.time > 0 for change in timeline.modes) else 0.6
        labels = {"tickvals": list(names), "ticktext": list(names.values())}
        figure.update_yaxes(**labels, range=[lower - 0.4, top], row=row, col=1)
    style(figure, title, height=height + 40 * bool(title))
    figure.update_yaxes(showgrid=False)
    figure.update_xaxes(range=[start * 1e3, end * 1e3], tickformat=",")
    figure.update_xaxes(title_text="ms", row=len(rows), col=1)
    if thinned_s:
        note(figure, thinning_note(thinned_s))
    return figure


def _panel(timeline: Timeline, bars: Sequence[Bar], start: float, end: float) -> list[go.Bar | go.Scatter]:
    """The traces of one Gantt: one per phase, then the marks in the rows below the lanes."""
    rows = {lane: -float(index) for index, lane in enumerate(lane_order(timeline.lanes))}
    traces: list[go.Bar | go.Scatter] = []
    for phase, colour in PHASE_COLOURS.items():
        if own := [bar for bar in bars if bar.phase == phase]:
            traces.append(
                go.Bar(
                    **{"name": PHASE_LABELS[phase], "legendgroup": phase, "orientation": "h"},
                    y=[rows[bar.lane] for bar in own],
                    base=[bar.start * 1e3 for bar in own],
                    x=[bar.ms for bar in own],
                    width=0.8,
                    marker={"color": colour, "line": {"width": 0}},
                    customdata=[[bar.lane, bar.tooltip] for bar in own],
                    hovertemplate="%{customdata[1]}<br>from %{base:.2f} ms<extra>%{customdata[0]}</extra>",
                )
            )
    handed = [(r, r.hand_off) for r in timeline.requests if r.hand_off is not None and start <= r.hand_off <= end]
    first = [(r, r.token_times[0]) for r in timeline.requests if r.token_times and start <= r.token_times[0] <= end]
    upper, lower = _mark_rows(timeline)
    for name, symbol, y, events in (
        ("hand-off", "diamond", upper, [event for event in handed if not event[0].preemptions]),
        ("resumed", "diamond-open", upper, [event for event in handed if event[0].preemptions]),
        ("first token", "line-ns-open", lower, first),
    ):
        if events:
            traces.append(marks(name, symbol, events, [y] * len(events)))
    if changes := _mode_changes(timeline, start, end):
        traces.append(changes)
    return traces


def _mark_rows(timeline: Timeline) -> tuple[float, float]:
    """Heights of the hand-off and of the first-token row, below the last lane (lane i sits at -i).

    Without requests there is nothing to mark: both are the last lane's lower edge.
    """
    lowest = -max(0, len(timeline.lanes) - 1)
    return (lowest - 0.75, lowest - 1.25) if timeline.requests else (lowest - 0.2, lowest - 0.2)


def _mode_changes(timeline: Timeline, start: float, end: float) -> go.Scatter | None:
    """A dashed line and a name where the mode changed in mid-run; None where it never did."""
    if all(change.time <= 0 for change in timeline.modes):
        return None
    x: list[float | None] = []
    names: list[str] = []
    free = start
    for change in timeline.modes:
        if start <= change.time <= end:
            readable = change.time >= free
            name = change_name(change)
            names += [name if readable else "", name, ""]
            x += [change.time * 1e3, change.time * 1e3 if change.time > 0 else None, None]
            free = change.time + (end - start) * 0.012 * (len(name) + 1) if readable else free
    return go.Scatter(
        **{"name": "mode change", "legendgroup": "mode change", "legendrank": 1002},
        x=x,
        y=[0.5, _mark_rows(timeline)[1], None] * (len(x) // 3),
        mode="lines+text",
        text=[name if index % 3 == 0 else "" for index, name in enumerate(names)],
        textposition="top right",
        line={"color": INK, "dash": "dash", "width": 1},
        customdata=names,
        hovertemplate="mode from here: %{customdata}<br>%{x:.2f} ms<extra></extra>",
    )
