"""A run as bars to be drawn: one for each span, or one for several neighbours where they are too many to tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from splitwiser_lab.timeline import Span, SpanPhase


@dataclass(frozen=True, slots=True)
class Bar:
    """What is drawn for one span, or for `spans` neighbours too short to be told apart.

    Times in seconds. `sequences` is the largest of its spans, the tokens are their sum.
    """

    lane: str
    phase: SpanPhase
    start: float
    end: float
    prefill_tokens: int
    decode_tokens: int
    sequences: int
    spans: int = 1

    @property
    def ms(self) -> float:
        """Length in milliseconds."""
        return (self.end - self.start) * 1e3

    @property
    def tooltip(self) -> str:
        """Everything known of it, in one line."""
        parts = [self.phase, f"{self.ms:.2f} ms", f"{self.prefill_tokens} prompt tokens" * (self.prefill_tokens > 0)]
        parts += [f"{self.decode_tokens} decode tokens" * (self.decode_tokens > 0), f"{self.sequences} sequences"]
        parts += [f"{self.spans} steps in one bar" * (self.spans > 1)]
        return " · ".join(part for part in parts if part)


def thinned(spans: Sequence[Span], limit: int, shortest: float = 0.0) -> tuple[list[Bar], float]:
    """At most `limit` bars (or one per lane and phase) for these spans, and the length they were thinned by.

    Neighbours on a lane that are shorter than `shortest` seconds become one bar if they share their phase;
    if not, all that lie within `shortest` become one bar per phase, as long as that phase ran. `shortest`
    grows until the bars are few enough; 0.0 comes back where every span has its own bar.
    """
    bars = _bars(spans, shortest)
    length = max((s.end for s in spans), default=0.0) - min((s.start for s in spans), default=0.0)
    while len(bars) > limit and shortest <= length:
        shortest = 1.5 * shortest or length / limit or 1e-9
        bars = _bars(spans, shortest)
    return bars, shortest if len(bars) < len(spans) else 0.0


def _bars(spans: Sequence[Span], shortest: float) -> list[Bar]:
    lanes: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda s: s.start):
        lanes.setdefault(span.lane, []).append(span)
    return [bar for lane in lanes.values() for group in _neighbours(lane, shortest) for bar in _drawn(group)]


def _neighbours(lane: Sequence[Span], shortest: float) -> Iterator[list[Span]]:
    """Cut one lane's spans, in order of start, into groups to be drawn together."""
    group: list[Span] = []
    one_phase = True
    for span in lane:
        same = one_phase and bool(group) and span.phase == group[-1].phase
        joins = (
            bool(group)
            and max(span.seconds, group[-1].seconds, span.start - group[-1].end) < shortest
            and (same or span.end - group[0].start < shortest)
        )
        if group and not joins:
            yield group
            group = []
        one_phase = not group or same
        group.append(span)
    if group:
        yield group


def _drawn(group: Sequence[Span]) -> Iterator[Bar]:
    phases = dict.fromkeys(span.phase for span in group)
    start = group[0].start
    for phase in phases:
        own = [span for span in group if span.phase == phase]
        end = group[-1].end if len(phases) == 1 else start + sum(span.seconds for span in own)
        tokens = sum(s.prefill_tokens for s in own), sum(s.decode_tokens for s in own)
        yield Bar(own[0].lane, phase, start, end, *tokens, max(s.sequences for s in own), len(own))
        start = end


def thinning_note(shortest: float) -> str:
    """What was done to a Gantt thinned by `shortest` seconds."""
    ms = f"{shortest * 1e3:,.0f}" if shortest >= 0.01 else f"{shortest * 1e3:.2g}"
    return f"Neighbouring steps shorter than {ms} ms are drawn as one bar per phase."
