"""The look that all interactive pictures share, and the marks that several of them draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from splitwiser_lab.lab.palette import FAINT, INK, PAPER
from splitwiser_lab.timeline import RequestRecord


def style(figure: go.Figure, title: str | None, height: float) -> None:
    """Give a figure the look that all of them share; `height` in pixels."""
    figure.update_layout(
        title={"text": title, "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 14}},
        template="none",
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        font={"color": INK, "size": 12},
        height=round(height),
        margin={"l": 90, "r": 24, "t": 64 if title else 40, "b": 96},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        showlegend=True,
        barmode="overlay",
    )
    line = {"gridcolor": FAINT, "linecolor": FAINT, "tickcolor": FAINT, "zeroline": False}
    figure.update_xaxes(**line, title_standoff=6)
    figure.update_yaxes(**line)


def note(figure: go.Figure, text: str) -> None:
    """A sentence below the axis."""
    place: dict[str, Any] = {"x": 0, "y": 0, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top"}
    figure.add_annotation(text=f"<i>{text}</i>", yshift=-40, showarrow=False, font_size=11, **place)


def marks(name: str, symbol: str, events: Sequence[tuple[RequestRecord, float]], y: Sequence[float]) -> go.Scatter:
    """Marks for events (request, seconds) at these heights."""
    return go.Scatter(
        **{"name": name, "legendgroup": name, "legendrank": 1001},
        x=[seconds * 1e3 for _, seconds in events],
        y=list(y),
        mode="markers",
        marker={"symbol": symbol, "size": 8, "color": INK, "line": {"width": 1.5, "color": INK}},
        customdata=[life(request) for request, _ in events],
        hovertemplate=name + " at %{x:.2f} ms<br>%{customdata}<extra></extra>",
    )


def life(request: RequestRecord) -> str:
    """What became of a request, in one line."""
    tokens = f"{request.prompt_tokens} prompt tokens, {len(request.token_times)} new tokens"
    preempted = f", {request.preemptions} preemption(s)" * bool(request.preemptions)
    return f"request {request.id}: {tokens}, {request.error or request.finish_reason}{preempted}"
