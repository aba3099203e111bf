"""Interactive pictures of a run, drawn by plotly from its timeline.

Each phase has one colour everywhere (that of `lab.static`, which draws the same Gantt without plotly).
Backgrounds are transparent and text is mid-grey, so that every figure sits on a light or a dark page.
Times are seconds in a timeline and milliseconds on an axis. This module measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from splitwiser_lab.lab.static import GREY, PHASE_COLOURS, PHASE_LABELS, Bar, shares, thinned, thinning_note
from splitwiser_lab.timeline import RequestRecord, Timeline

MOST_BARS = 2000
MOST_REQUESTS = 300
WAITING_COLOUR = "#BBBBBB"
_FAINT = "rgba(128,128,128,0.25)"
# Modes are not phases: their colours are the rest of the palette, and dashes say the same again.
_MODE_COLOURS = ("#009E73", "#D55E00", "#56B4E9", "#AA4499", "#999933", "#888888")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_Window = tuple[float, float]


def gantt(timeline: Timeline, title: str | None = None, window: _Window | None = None) -> go.Figure:
    """Lanes as rows, spans as bars coloured by phase; hand-offs, first tokens and mode changes marked.

    `window` is (start, end) in seconds: only what touches it is drawn. More than 2000 spans are thinned
    out, and a note below the axis says so.
    """
    return _gantts({"": timeline}, window, title)


def gantts(timelines: Mapping[str, Timeline], title: str | None = None, window: _Window | None = None) -> go.Figure:
    """One Gantt per mode, one below the other over the same time axis. Raises ValueError for no timeline."""
    if not timelines:
        raise ValueError("there is no timeline to draw: give {mode: timeline}")
    return _gantts(timelines, window, title)


def requests(timeline: Timeline, title: str | None = None) -> go.Figure:
    """Each request's life as a row, in order of arrival: waiting, prefill (to its first token), decode.

    An x ends a request that did not complete; "resumed" marks the hand-off after a preemption. Of more
    than 300 requests an even sample is shown, and a note says so.
    """
    arrived = sorted(timeline.requests, key=lambda r: (r.arrival, r.id))
    shown = arrived[:: -(-len(arrived) // MOST_REQUESTS)] if arrived else []
    figure = go.Figure()
    rows = {request.id: row for row, request in enumerate(shown)}
    segments = {request.id: _segments(request, timeline.duration) for request in shown}
    colours = {"waiting": WAITING_COLOUR, "prefill": PHASE_COLOURS["prefill"], "decode": PHASE_COLOURS["decode"]}
    for index, (name, colour) in enumerate(colours.items()):
        parts = [(r, *segments[r.id][index]) for r in shown if segments[r.id][index][1] > segments[r.id][index][0]]
        figure.add_bar(
            name=name,
            orientation="h",
            y=[rows[request.id] for request, _, _ in parts],
            base=[start * 1e3 for _, start, _ in parts],
            x=[(end - start) * 1e3 for _, start, end in parts],
            customdata=[_life(request) for request, _, _ in parts],
            hovertemplate=f"{name} %{{x:.2f}} ms<br>%{{customdata}}<extra></extra>",
            marker={"color": colour, "line": {"width": 0}},
            width=0.8,
        )
    resumed = [(r, r.hand_off) for r in shown if r.preemptions and r.hand_off is not None]
    ended = [(r, segments[r.id][2][1]) for r in shown if not r.completed]
    for name, symbol, events in (("resumed", "diamond-open", resumed), ("did not complete", "x", ended)):
        if events:
            figure.add_trace(_marks(name, symbol, events, [rows[r.id] for r, _ in events]))
    ticks = list(range(0, len(shown), -(-len(shown) // 25) or 1))
    labels = {"tickvals": ticks, "ticktext": [str(shown[i].id) for i in ticks]}
    figure.update_yaxes(title_text="request", range=[len(shown) - 0.4, -0.6], **labels)
    style(figure, title, height=130 + min(600, max(120, 20 * len(shown))))
    figure.update_xaxes(title_text="ms", tickformat=",", rangemode="tozero")
    if len(shown) < len(arrived):
        _note(figure, f"{len(shown)} of {len(arrived)} requests are shown, evenly chosen.")
    return figure


def itl(timelines: Mapping[str, Timeline], title: str | None = None) -> go.Figure:
    """How the gaps between tokens (ITL, completed requests) are distributed in each mode.

    One cumulative curve per mode over a logarithmic axis; the legend has p50, p99 and the maximum.
    """
    figure = go.Figure()
    # Dense at the top, where stalls are; ≤300 points keep the notebook small.
    levels = np.concatenate([np.linspace(0, 0.95, 150), np.linspace(0.95, 1, 120)[1:]])
    for (name, timeline), colour, dash in zip(timelines.items(), cycle(_MODE_COLOURS), cycle(_DASHES), strict=False):
        gaps = [np.diff(request.token_times) * 1e3 for request in timeline.requests if request.completed]
        pooled = np.concatenate(gaps) if gaps else np.empty(0)
        if not pooled.size:
            continue
        p50, p99 = np.percentile(pooled, (50, 99))
        figure.add_scatter(
            name=f"{name}: p50 {p50:.1f}, p99 {p99:.1f}, max {pooled.max():.1f} ms",
            # A logarithmic axis has no place for tokens that arrived together.
            x=np.maximum(np.quantile(pooled, levels), 1e-3).tolist(),
            y=(levels * 100).tolist(),
            mode="lines",
            line={"color": colour, "dash": dash, "width": 2.5},
            hovertemplate=f"{name}: %{{y:.1f}} % of the gaps take at most %{{x:.2f}} ms<extra></extra>",
        )
    style(figure, title, height=420)
    figure.update_xaxes(title_text="gap between two tokens (ms)", type="log", dtick="D2", tickformat=",")
    figure.update_yaxes(title_text="share of gaps (%)", range=[-2, 102])
    corner = {"x": 0.99, "xanchor": "right", "y": 0.03, "yref": "paper"}  # the corner that such curves leave free
    figure.update_layout(legend={"orientation": "v", **corner}, margin_b=60)
    return figure


def two_phases(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> go.Figure:
    """Tokens per second of prefill and of decode over the tokens that go into one step; both axes logarithmic.

    Each row has `phase` ("prefill" or "decode"), `tokens` (prompt tokens per sequence; for decode, the context
    length), `batch` (sequences), `ms` and `tokens_per_s`. Where two rows of a phase put the same number of
    tokens into a step, there is one line per batch size (prefill) or context length (decode).
    """
    figure = go.Figure()
    for phase in ("prefill", "decode"):
        own = [(max(1, round(row["tokens_per_s"] * row["ms"] / 1e3)), row) for row in rows if row["phase"] == phase]
        split, word = ("batch", "batch") if phase == "prefill" else ("tokens", "context")
        apart = len({size for size, _ in own}) < len(own)
        groups = sorted({row[split] for _, row in own}) if apart else [None] * bool(own)
        for group, dash, symbol in zip(groups, cycle(_DASHES), cycle(("circle", "square", "diamond")), strict=False):
            line = sorted(((x, row) for x, row in own if group in (None, row[split])), key=lambda point: point[0])
            figure.add_scatter(
                name=phase if group is None else f"{phase}, {word} {group:,}",
                x=[x for x, _ in line],
                y=[row["tokens_per_s"] for _, row in line],
                customdata=[[row["tokens"], row["batch"], row["ms"]] for _, row in line],
                hovertemplate=phase + ": %{y:,.0f} tok/s<br>batch %{customdata[1]}, %{customdata[0]} tokens each<br>"
                "%{customdata[2]:.2f} ms a step<extra></extra>",
                mode="lines+markers",
                line={"color": PHASE_COLOURS[phase], "dash": dash, "width": 2.5},
                marker={"symbol": symbol, "size": 8},
            )
    style(figure, title, height=420)
    # Two ticks per decade: plain numbers that do not crowd.
    figure.update_xaxes(title_text="tokens in one step", type="log", dtick="D2", tickformat=",")
    figure.update_yaxes(title_text="tokens per second", type="log", dtick="D2", tickformat="~s")
    return figure


def _gantts(timelines: Mapping[str, Timeline], window: _Window | None, title: str | None) -> go.Figure:
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
        names = {-float(index): lane for index, lane in enumerate(timeline.lanes)}
        names |= {upper: "hand-off", lower: "first token"} if timeline.requests else {}
        top = 1.1 if any(change.time > 0 for change in timeline.modes) else 0.6
        labels = {"tickvals": list(names), "ticktext": list(names.values())}
        figure.update_yaxes(**labels, range=[lower - 0.4, top], row=row, col=1)
    style(figure, title, height=height + 40 * bool(title))
    figure.update_yaxes(showgrid=False)
    figure.update_xaxes(range=[start * 1e3, end * 1e3], tickformat=",")
    figure.update_xaxes(title_text="ms", row=len(rows), col=1)
    if thinned_s:
        _note(figure, thinning_note(thinned_s))
    return figure


def _panel(timeline: Timeline, bars: Sequence[Bar], start: float, end: float) -> list[go.Bar | go.Scatter]:
    """The traces of one Gantt: one per phase, then the marks in the rows below the lanes."""
    rows = {lane: -float(index) for index, lane in enumerate(timeline.lanes)}
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
            traces.append(_marks(name, symbol, events, [y] * len(events)))
    if changes := _mode_changes(timeline, start, end):
        traces.append(changes)
    return traces


def _mark_rows(timeline: Timeline) -> tuple[float, float]:
    """Heights of the hand-off and of the first-token row, below the last lane (lane i sits at -i).

    Without requests there is nothing to mark: both are the last lane's lower edge.
    """
    lowest = -max(0, len(timeline.lanes) - 1)
    return (lowest - 0.75, lowest - 1.25) if timeline.requests else (lowest - 0.2, lowest - 0.2)


def _marks(name: str, symbol: str, events: Sequence[tuple[RequestRecord, float]], y: Sequence[float]) -> go.Scatter:
    """Marks for events (request, seconds) at these heights."""
    return go.Scatter(
        **{"name": name, "legendgroup": name, "legendrank": 1001},
        x=[seconds * 1e3 for _, seconds in events],
        y=list(y),
        mode="markers",
        marker={"symbol": symbol, "size": 8, "color": GREY, "line": {"width": 1.5, "color": GREY}},
        customdata=[_life(request) for request, _ in events],
        hovertemplate=name + " at %{x:.2f} ms<br>%{customdata}<extra></extra>",
    )


def _life(request: RequestRecord) -> str:
    tokens = f"{request.prompt_tokens} prompt tokens, {len(request.token_times)} new tokens"
    preempted = f", {request.preemptions} preemption(s)" * bool(request.preemptions)
    return f"request {request.id}: {tokens}, {request.error or request.finish_reason}{preempted}"


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
            names += [change.mode if readable else "", change.mode, ""]
            x += [change.time * 1e3, change.time * 1e3 if change.time > 0 else None, None]
            free = change.time + (end - start) * 0.012 * (len(change.mode) + 1) if readable else free
    return go.Scatter(
        **{"name": "mode change", "legendgroup": "mode change", "legendrank": 1002},
        x=x,
        y=[0.5, _mark_rows(timeline)[1], None] * (len(x) // 3),
        mode="lines+text",
        text=[name if index % 3 == 0 else "" for index, name in enumerate(names)],
        textposition="top right",
        line={"color": GREY, "dash": "dash", "width": 1},
        customdata=names,
        hovertemplate="mode from here: %{customdata}<br>%{x:.2f} ms<extra></extra>",
    )


def _segments(request: RequestRecord, duration: float) -> tuple[tuple[float, float], ...]:
    """(start, end) of waiting, prefill and decode, in seconds; what never began is empty."""
    last = max(request.token_times[-1] if request.token_times else request.arrival, request.finished or 0.0)
    end = duration if request.finish_reason == "unfinished" else last
    begun = end if request.scheduled is None else request.scheduled
    first = request.token_times[0] if request.token_times else end
    return (request.arrival, begun), (begun, first), (first, end)


def style(figure: go.Figure, title: str | None, height: float) -> None:
    """Give a figure the look that all of them share; `height` in pixels."""
    figure.update_layout(
        title={"text": title, "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 14}},
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 12},
        height=round(height),
        margin={"l": 90, "r": 24, "t": 64 if title else 40, "b": 96},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        showlegend=True,
        barmode="overlay",
    )
    line = {"gridcolor": _FAINT, "linecolor": _FAINT, "tickcolor": _FAINT, "zeroline": False}
    figure.update_xaxes(**line, title_standoff=6)
    figure.update_yaxes(**line)


def _note(figure: go.Figure, text: str) -> None:
    place: dict[str, Any] = {"x": 0, "y": 0, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top"}
    figure.add_annotation(text=f"<i>{text}</i>", yshift=-40, showarrow=False, font_size=11, **place)
