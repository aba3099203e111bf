"""The Gantt of a run as a small SVG, without any library: for notebooks on the web, the README, the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from splitwiser_lab.lab.lane_rows import change_name, lane_order
from splitwiser_lab.lab.palette import INK, PHASE_COLOURS, PHASE_LABELS
from splitwiser_lab.lab.svg import page, ticks
from splitwiser_lab.lab.thinning import Bar, thinned, thinning_note
from splitwiser_lab.metrics import busy_seconds, overlap_seconds
from splitwiser_lab.timeline import Timeline

# Together these keep the picture under 60 KB.
_MOST_BARS, _MOST_TOOLTIPS, _MOST_MARKS = 450, 200, 400
_ROW, _GAP, _MARK_ROW = 20, 5, 14  # heights in pixels


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
        title = f"When each lane ran prefill and decode: {names}"
        return page("gantt", self.width, height, title, described, self.parts)

    def x(self, seconds: float) -> float:
        return self.left + (self.right - self.left) * seconds / self.span_s

    def _text(self, x: float, text: str, anchor: str = "start", more: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{self.y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>')

    def _legend(self) -> None:
        present = {span.phase for timeline in self.timelines.values() for span in timeline.spans}
        labels = {phase: label for phase, label in PHASE_LABELS.items() if phase in present}
        self.y, x = 16.0, min(self.left, self.width - sum(42 + 6.6 * len(label) for label in labels.values()))
        for phase, label in labels.items():
            self.parts.append(f'<circle cx="{x + 6:.1f}" cy="12" r="6" fill="{PHASE_COLOURS[phase]}"/>')
            self._text(x + 17, label)
            x += 42 + 6.6 * len(label)

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
            self._mode_names([(self.x(c.time), change_name(c)) for c in changes])
        top = self.y + 7
        bars, shortest = self.bars[name]
        self.thinned_s = max(self.thinned_s, shortest)
        self.y = top
        for lane in lane_order(timeline.lanes):
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
            f'<path d="M{self.left:.1f} {self.y + _ROW / 2:.1f}H{self.right:.1f}" stroke="{INK}" '
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

    def _marks(self, name: str, times: Iterable[float], shape: str = "m-4 0l4-4 4 4-4 4z", fill: str = INK) -> None:
        at = self._columns(times)
        if not at:
            return
        middle = self.y + _MARK_ROW / 2
        path = "".join(f"M{x} {middle:g}{shape}" for x in at)
        self.parts.append(f'<path class="{name}" d="{path}" fill="{fill}" stroke="{INK}" stroke-width="1.5"/>')
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
        """Each name where it has room until the next change: with its options, else without, else not at all."""
        ends = [x for x, _ in changes[1:]] + [float(self.width)]
        for (x, name), end in zip(changes, ends, strict=True):
            fitting = [text for text in (name, name.split(" (")[0]) if x + 6.3 * len(text) + 6 <= end]
            if fitting:
                self._text(x + 3, fitting[0], more=' font-size="11" font-style="italic"')

    def _lines(self, at: Sequence[float], top: float, opacity: str) -> None:
        path = "".join(f"M{x:.1f} {top:g}V{self.y:g}" for x in at)
        if path:
            self.parts.append(f'<path d="{path}" stroke="{INK}" stroke-opacity="{opacity}"/>')

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


def _fit(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
