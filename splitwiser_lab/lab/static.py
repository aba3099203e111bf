"""The Gantt of a run as a small SVG, without any library: for notebooks on the web, the README, the report.

It also holds what the interactive plots share with it, so that both look alike: the colour and label of
each phase, and the bars that a long run is thinned out to. It knows no plotly and no notebook.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from splitwiser_lab.metrics import busy_seconds, overlap_seconds
from splitwiser_lab.timeline import Span, SpanPhase, Timeline

# Okabe and Ito's palette: told apart with any colour vision, on white and on black.
PHASE_COLOURS: dict[SpanPhase, str] = {"prefill": "#E69F00", "decode": "#0072B2", "mixed": "#CC79A7"}
PHASE_LABELS: dict[SpanPhase, str] = {"prefill": "prefill", "decode": "decode", "mixed": "mixed: both in one batch"}
GREY = "#777777"  # reads on white (4.5:1) and on black (4.7:1)

# Together these keep the picture under 60 KB.
_MOST_BARS, _MOST_TOOLTIPS, _MOST_MARKS = 450, 200, 400
_ROW, _GAP, _MARK_ROW = 20, 5, 14  # heights in pixels


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


def shares(timeline: Timeline) -> list[str]:
    """How long the run took and in what share of it each phase ran, as short phrases."""
    total = timeline.duration
    if not timeline.spans or total <= 0:
        return ["nothing ran"]
    phrases = [f"{total * 1e3:,.0f} ms" if total >= 0.01 else f"{total * 1e3:.2f} ms"]
    for phase in PHASE_COLOURS:
        if busy := busy_seconds(timeline, phase=phase):
            phrases.append(f"{phase} {_share(busy / total)}")
    return [*phrases, f"prefill beside decode {_share(overlap_seconds(timeline) / total)}"]


def _share(part: float) -> str:
    return "<1%" if 0 < part < 0.005 else f"{part:.0%}"


def gantt_svg(timelines: Mapping[str, Timeline], width: int = 900) -> str:
    """Draw one panel per mode over a shared time axis: lanes as rows, spans as bars, hand-offs below.

    The picture fits light and dark pages, needs no script or font, and stays under 60 KB: where spans are
    thinner than half a pixel, neighbours are drawn as one bar, and a caption says so. `width` in pixels.
    Raises ValueError when there is no timeline to draw, or for a width below 400.
    """
    if not timelines or width < 400:
        raise ValueError(
            f"a Gantt needs a timeline and a width of 400 pixels or more, got {len(timelines)} and {width}"
        )
    return _Drawing(timelines, width).svg()


class _Drawing:
    """Lays out the panels from top to bottom; `y` is where the next thing goes."""

    def __init__(self, timelines: Mapping[str, Timeline], width: int) -> None:
        self.timelines = timelines
        self.width = width
        names = ["first token", *(lane for timeline in timelines.values() for lane in timeline.lanes)]
        self.left = min(14 + 6.6 * max(len(name) for name in names), width / 3)
        self.right = width - 26.0
        self.span_s = max((t.duration for t in timelines.values()), default=0.0) or 1e-3
        self.y = 0.0
        self.parts: list[str] = []
        self.thinned_s = 0.0
        # Bars share one budget: half a pixel is the least that shows, more is merged in longer runs.
        limit = _MOST_BARS // len(timelines)
        half_pixel = 0.5 * self.span_s / (self.right - self.left)
        self.bars = {name: thinned(timeline.spans, limit, half_pixel) for name, timeline in timelines.items()}
        self.tooltips = sum(len(bars) for bars, _ in self.bars.values()) <= _MOST_TOOLTIPS

    def svg(self) -> str:
        self._legend()
        for name, timeline in self.timelines.items():
            self._panel(name, timeline)
        self._axis_labels()
        self._caption()
        height = math.ceil(self.y + 6)
        names = ", ".join(self.timelines)
        described = "; ".join(f"{name}: {', '.join(shares(t))}" for name, t in self.timelines.items())
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="gantt" role="img" viewBox="0 0 {self.width} {height}" '
            f'width="{self.width}" height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="{GREY}">'
            f"<title>{escape(f'When each lane ran prefill and decode: {names}')}</title>"
            f"<desc>{escape(described)}</desc>" + "\n".join(self.parts) + "</svg>"
        )

    def x(self, seconds: float) -> float:
        return self.left + (self.right - self.left) * seconds / self.span_s

    def _text(self, x: float, text: str, anchor: str = "start", more: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{self.y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>')

    def _legend(self) -> None:
        present = {span.phase for timeline in self.timelines.values() for span in timeline.spans}
        labels = {phase: label for phase, label in PHASE_LABELS.items() if phase in present}
        self.y, x = 16.0, min(self.left, self.width - sum(34 + 6.6 * len(label) for label in labels.values()))
        for phase, label in labels.items():
            self.parts.append(f'<circle cx="{x + 6:.1f}" cy="12" r="6" fill="{PHASE_COLOURS[phase]}"/>')
            self._text(x + 17, label)
            x += 34 + 6.6 * len(label)

    def _panel(self, name: str, timeline: Timeline) -> None:
        self.y += 26
        heading = _fit(name, int((self.right - self.left) / 9))
        self._text(self.left, heading, more=' font-size="14" font-weight="600"')
        phrases = shares(timeline)
        while 6.3 * len(" · ".join(phrases)) > self.right - self.left - 9 * len(heading) - 20 and phrases:
            phrases.pop()
        self._text(self.right, " · ".join(phrases), "end")
        changes = [c for c in timeline.modes if c.time > 0] and list(timeline.modes)
        if changes:
            self.y += 15
            self._mode_names([(self.x(c.time), c.mode) for c in changes])
        top = self.y + 7
        bars, shortest = self.bars[name]
        self.thinned_s = max(self.thinned_s, shortest)
        self.y = top
        for lane in timeline.lanes:
            self._lane(lane, [bar for bar in bars if bar.lane == lane])
        preempted = [r.hand_off for r in timeline.requests if r.hand_off is not None and r.preemptions]
        self._marks("hand-off", [r.hand_off for r in timeline.requests if r.hand_off is not None and not r.preemptions])
        self._marks("resumed", preempted, fill="none")
        self._marks("first token", [r.token_times[0] for r in timeline.requests if r.token_times], "m0-4v8")
        self._lines([self.x(t / 1e3) for t in ticks(self.span_s * 1e3)], top, "0.25")
        self._lines(self._columns(c.time for c in changes if c.time > 0), top - 16, '0.9" stroke-dasharray="3 3')

    def _lane(self, lane: str, bars: Sequence[Bar]) -> None:
        room = int((self.left - 14) / 6.6)
        self.parts.append(
            f'<path d="M{self.left:.1f} {self.y + _ROW / 2:.1f}H{self.right:.1f}" stroke="{GREY}" '
            f'stroke-opacity="0.1" stroke-width="{_ROW}"/>'
        )
        for phase, colour in PHASE_COLOURS.items():
            rects = [self._rect(bar) for bar in bars if bar.phase == phase]
            if rects:
                self.parts.append(f'<g class="{phase}" fill="{colour}">{"".join(rects)}</g>')
        self.y += _ROW / 2 + 4
        self._text(self.left - 8, _fit(lane, room), "end")
        self.y += _ROW / 2 - 4 + _GAP

    def _rect(self, bar: Bar) -> str:
        wide = self.x(bar.end) - self.x(bar.start)
        # A hairline between steps where there is room; else a touch more, or the page shines through each seam.
        drawn = wide - 0.6 if wide > 6 else wide + 0.4
        box = f'<rect x="{self.x(bar.start):.1f}" y="{self.y:g}" width="{drawn:.1f}" height="{_ROW}"'
        return f"{box}><title>{escape(bar.tooltip)}</title></rect>" if self.tooltips else f"{box}/>"

    def _marks(self, name: str, times: Iterable[float], shape: str = "m-4 0l4-4 4 4-4 4z", fill: str = GREY) -> None:
        at = self._columns(times)
        if not at:
            return
        middle = self.y + _MARK_ROW / 2
        path = "".join(f"M{x} {middle:g}{shape}" for x in at)
        self.parts.append(f'<path class="{name}" d="{path}" fill="{fill}" stroke="{GREY}" stroke-width="1.5"/>')
        self.y = middle + 4
        self._text(self.left - 8, name, "end", ' font-size="11"')
        self.y = middle + _MARK_ROW / 2

    def _columns(self, times: Iterable[float]) -> list[int]:
        """Pixel columns of these times, each once; a coarser grid where they are too many to tell apart."""
        columns, grid = sorted({round(self.x(time)) for time in times}), 1
        while len(columns) > _MOST_MARKS / len(self.timelines):
            grid *= 2
            columns = sorted({grid * (column // grid) for column in columns})
        return columns

    def _mode_names(self, changes: Sequence[tuple[float, str]]) -> None:
        free = 0.0
        for x, mode in changes:
            if x >= free and x + 6.3 * len(mode) <= self.width:
                self._text(x + 3, mode, more=' font-size="11" font-style="italic"')
                free = x + 6.3 * len(mode) + 12

    def _lines(self, at: Sequence[float], top: float, opacity: str) -> None:
        path = "".join(f"M{x:.1f} {top:g}V{self.y:g}" for x in at)
        if path:
            self.parts.append(f'<path d="{path}" stroke="{GREY}" stroke-opacity="{opacity}"/>')

    def _axis_labels(self) -> None:
        self.y += 14
        self._text(self.left - 16, "ms", "end", ' font-size="11"')
        for mark in ticks(self.span_s * 1e3):
            self._text(self.x(mark / 1e3), f"{mark:,.10g}", "middle", ' font-size="11"')

    def _caption(self) -> None:
        if self.thinned_s:
            self.y += 18
            note = thinning_note(self.thinned_s)
            self._text(min(self.left, self.width - 5.8 * len(note)), note, more=' font-size="11" font-style="italic"')


def thinning_note(shortest: float) -> str:
    """What was done to a Gantt thinned by `shortest` seconds."""
    ms = f"{shortest * 1e3:,.0f}" if shortest >= 0.01 else f"{shortest * 1e3:.2g}"
    return f"Neighbouring steps shorter than {ms} ms are drawn as one bar per phase."


def ticks(end: float, most: int = 8) -> list[float]:
    """Round numbers from 0 to `end`, at most `most` steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(end / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * most >= end)
    return [round(i * step, 10) for i in range(math.floor(end / step + 1e-9) + 1)]


def _fit(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
