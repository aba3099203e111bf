"""Small runs whose pictures are known, and what is looked up in a plotly figure."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go

from splitwiser_lab.timeline import ModeChange, RequestRecord, Span, SpanPhase, Timeline


def span(lane: str, phase: SpanPhase, start: float, end: float, mode: str = "processes") -> Span:
    return Span(lane, phase, start, end, 128 if phase != "decode" else 0, 3 if phase != "prefill" else 0, 3, mode)


def processes() -> Timeline:
    """Two lanes that overlap, two requests, one of them preempted once; 0.5 s."""
    return Timeline(
        spans=(
            span("prefill", "prefill", 0.0, 0.2),
            span("decode", "decode", 0.2, 0.25),
            span("decode", "decode", 0.25, 0.31),
            span("prefill", "prefill", 0.2, 0.4),
            span("decode", "mixed", 0.4, 0.5),
        ),
        requests=(
            RequestRecord(0, 128, 0.0, (0.2, 0.25, 0.31), 0.0, 0.21, 0.31, "length"),
            RequestRecord(1, 128, 0.1, (0.4, 0.5), 0.2, 0.45, 0.5, "stop", preemptions=1),
        ),
        modes=(ModeChange(0.0, "processes"),),
    )


def flipped() -> Timeline:
    """The same with a change of mode at 0.2 s."""
    modes = (ModeChange(0.0, "sequential"), ModeChange(0.2, "chunked", {"chunk_tokens": 64}))
    return replace(processes(), modes=modes)


def steps(count: int, lane: str = "main", ms: float = 10.0) -> Timeline:
    """Decode steps in a row, every tenth a prefill."""
    phases: list[SpanPhase] = ["prefill" if i % 10 == 0 else "decode" for i in range(count)]
    spans = tuple(span(lane, phase, i * ms / 1e3, (i + 0.95) * ms / 1e3) for i, phase in enumerate(phases))
    tokens = tuple(s.end for s in spans)
    return Timeline(spans, tuple(RequestRecord(i, 9, 0.0, (t,), 0.0, t, t, "stop") for i, t in enumerate(tokens)))


def traces(figure: go.Figure, name: str) -> list[go.Bar | go.Scatter]:
    return [trace for trace in figure.data if trace.name == name]


def bars_of(figure: go.Figure) -> list[go.Bar]:
    return [trace for trace in figure.data if isinstance(trace, go.Bar)]


def notes(figure: go.Figure) -> str:
    return " ".join(annotation.text for annotation in figure.layout.annotations)
