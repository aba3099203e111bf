"""Interactive pictures of a run, drawn by plotly from its timeline.

Each phase has one colour everywhere, also in the static pictures. Times are seconds in a timeline and milliseconds on
an axis. This module measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go

from splitwiser_lab.lab.gantt_plot import MOST_BARS, gantt, gantts
from splitwiser_lab.lab.palette import DASHES, MODE_COLOURS, PHASE_COLOURS, WAITING_COLOUR
from splitwiser_lab.lab.plot_style import life, marks, note, style
from splitwiser_lab.timeline import RequestRecord, Timeline

__all__ = ["MOST_BARS", "MOST_REQUESTS", "gantt", "gantts", "itl", "requests", "style", "two_phases"]

MOST_REQUESTS = 300


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
            customdata=[life(request) for request, _, _ in parts],
            hovertemplate=f"{name} %{{x:.2f}} ms<br>%{{customdata}}<extra></extra>",
            marker={"color": colour, "line": {"width": 0}},
            width=0.8,
        )
    resumed = [(r, r.hand_off) for r in shown if r.preemptions and r.hand_off is not None]
    ended = [(r, segments[r.id][2][1]) for r in shown if not r.completed]
    for name, symbol, events in (("resumed", "diamond-open", resumed), ("did not complete", "x", ended)):
        if events:
            figure.add_trace(marks(name, symbol, events, [rows[r.id] for r, _ in events]))
    ticks = list(range(0, len(shown), -(-len(shown) // 25) or 1))
    labels = {"tickvals": ticks, "ticktext": [str(shown[i].id) for i in ticks]}
    figure.update_yaxes(title_text="request", range=[len(shown) - 0.4, -0.6], **labels)
    style(figure, title, height=130 + min(600, max(120, 20 * len(shown))))
    figure.update_xaxes(title_text="ms", tickformat=",", rangemode="tozero")
    if len(shown) < len(arrived):
        note(figure, f"{len(shown)} of {len(arrived)} requests are shown, evenly chosen.")
    return figure


def itl(timelines: Mapping[str, Timeline], title: str | None = None) -> go.Figure:
    """How the gaps between tokens (ITL, completed requests) are distributed in each mode.

    One cumulative curve per mode over a logarithmic axis; the legend below has p50, p99 and the maximum.
    """
    figure = go.Figure()
    # Dense at the top, where stalls are; ≤300 points keep the notebook small.
    levels = np.concatenate([np.linspace(0, 0.95, 150), np.linspace(0.95, 1, 120)[1:]])
    for (name, timeline), colour, dash in zip(timelines.items(), cycle(MODE_COLOURS), cycle(DASHES), strict=False):
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
    below = 20 * len(figure.data) + 64  # pixels for the axis and a legend of one line a mode
    style(figure, title, height=340 + below)
    figure.update_xaxes(title_text="gap between two tokens (ms)", type="log", dtick="D2", tickformat=",")
    figure.update_yaxes(title_text="share of gaps (%)", range=[-2, 102])
    figure.update_layout(legend_orientation="v", margin_b=below)
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
        for group, dash, symbol in zip(groups, cycle(DASHES), cycle(("circle", "square", "diamond")), strict=False):
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


def _segments(request: RequestRecord, duration: float) -> tuple[tuple[float, float], ...]:
    """(start, end) of waiting, prefill and decode, in seconds; what never began is empty."""
    last = max(request.token_times[-1] if request.token_times else request.arrival, request.finished or 0.0)
    end = duration if request.finish_reason == "unfinished" else last
    begun = end if request.scheduled is None else request.scheduled
    first = request.token_times[0] if request.token_times else end
    return (request.arrival, begun), (begun, first), (first, end)
