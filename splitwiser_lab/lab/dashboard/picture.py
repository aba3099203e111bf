"""The live view as one small SVG, without any library: for notebooks that are executed, for Colab, for the web.

It shows what `figure` shows, in the same colours, and the numbers and the line about the tokens with it.
"""

from __future__ import annotations

import textwrap
from html import escape

from splitwiser_lab.lab.dashboard import series
from splitwiser_lab.lab.dashboard.figure_style import KV_COLOUR, LINE_COLOURS, NO_READINGS, TITLES
from splitwiser_lab.lab.dashboard.frame import Frame
from splitwiser_lab.lab.dashboard.numbers import rows, sign, status
from splitwiser_lab.lab.dashboard.panel import Panel, Scale, Side
from splitwiser_lab.lab.lane_rows import lane_order
from splitwiser_lab.lab.palette import BAD, GOOD, INK, PHASE_COLOURS
from splitwiser_lab.lab.svg import page
from splitwiser_lab.timeline import Phase

WIDTH = 760
_LEFT, _RIGHT, _MIDDLE = 46, 34, 58  # pixels beside and between the panels
_PANEL, _LANE, _BELOW = 104, 20, 72  # heights; below a panel are its time axis and its legend
_MOST_LETTERS, _HEADING_LETTERS = 134, 84  # of a line of text
_RIGHT_EDGES = (282, 348, 410, 490, 584, 678, 752)  # of the columns of figures


def picture(frame: Frame) -> str:
    """Draw a frame. Fits light and dark pages and stays under 60 KB."""
    parts: list[str] = []
    y = _heading(frame, parts)
    half = (WIDTH - _LEFT - _RIGHT - _MIDDLE) / 2
    window = frame.last(frame.window)
    places = [
        (_LEFT, y),
        (_LEFT + half + _MIDDLE, y),
        (_LEFT, y + _PANEL + _BELOW),
        (_LEFT + half + _MIDDLE, y + _PANEL + _BELOW),
    ]
    boxes = [Panel(x, top, half, _PANEL, window, title) for (x, top), title in zip(places, TITLES, strict=False)]
    _hardware(boxes[0], frame)
    _rates(boxes[1], frame)
    _gaps(boxes[2], frame)
    boxes[3].scale(Scale.to_hold(series.kv_use(frame)[1]))
    boxes[3].line(series.kv_use(frame), KV_COLOUR, steps=True)
    for box in boxes:
        box.flips(frame.flips, named=box is boxes[0])
        parts += box.parts()
    y += 2 * (_PANEL + _BELOW)
    y = _lanes(frame, y, parts)
    said = f"{status(frame)} Tokens {frame.tokens.text}"
    return page("live", WIDTH, y, frame.heading, said, parts, letters=11)


def _heading(frame: Frame, parts: list[str]) -> float:
    """Heading, status, the line about the tokens and the table; returns where the panels begin."""
    recorded = "RECORDED · " if frame.recorded else ""
    colour = {True: GOOD, False: BAD, None: INK}[frame.tokens.holds]
    y = 0.0
    for text in textwrap.wrap(recorded + frame.heading, _HEADING_LETTERS)[:2]:
        y += 17
        parts.append(f'<text x="6" y="{y}" font-size="13" font-weight="600">{escape(text)}</text>')
    mark = f'<tspan fill="{colour}" font-weight="600">{sign(frame.tokens.holds)}</tspan> '
    for before, text in (("", status(frame)), (mark, f"tokens {frame.tokens.text}")):
        for row, words in enumerate(textwrap.wrap(text, _MOST_LETTERS) or [""]):
            y += 17
            parts.append(f'<text x="6" y="{y}">{"" if row else before}{escape(words)}</text>')
    columns = [6, *_RIGHT_EDGES]
    for number, line in enumerate(rows(frame)):
        y += 17
        weight = ' font-weight="600"' if number == 0 else ""
        for x, text in zip(columns, line, strict=True):
            anchor = "start" if x == 6 else "end"
            parts.append(f'<text x="{x}" y="{y}" font-size="10.5" text-anchor="{anchor}"{weight}>{escape(text)}</text>')
    return y + 30


def _hardware(box: Panel, frame: Frame) -> None:
    box.scale(Scale(0, 125, [0, 50, 100]))
    if not frame.lines:
        box.note(NO_READINGS)
    for line, colour in zip(frame.lines, LINE_COLOURS, strict=False):
        box.line(series.hardware(frame, line.key), colour)
        box.key(line.label, colour)


def _rates(box: Panel, frame: Frame) -> None:
    """Each phase on an axis of its own: prefill left, decode right."""
    sides: tuple[tuple[Phase, Side], ...] = (("prefill", "left"), ("decode", "right"))
    for phase, side in sides:
        points, colour = series.rate(frame, phase), PHASE_COLOURS[phase]
        box.scale(Scale.to_hold(points[1]), side)
        box.line(points, colour, side=side)
        box.key(f"{phase} ({side})", colour)


def _gaps(box: Panel, frame: Frame) -> None:
    points = series.gaps(frame)
    box.scale(Scale.logarithmic(points[1]))
    box.dots(points, PHASE_COLOURS["decode"])
    box.line(series.p99(frame), INK)
    box.key("ITL", PHASE_COLOURS["decode"])
    box.key("p99", INK)


def _lanes(frame: Frame, y: float, parts: list[str]) -> float:
    zoom = series.zoom(frame)
    bars, handed = series.bars(frame, zoom)
    names = lane_order(bar.lane for bar in bars)
    height = _LANE * max(1, len(names)) + (14 if handed else 0) + 16
    box = Panel(
        _LEFT + 10,
        y,
        WIDTH - _LEFT - _RIGHT - 10,
        height,
        frame.last(zoom),
        f"{TITLES[4]}, the last {zoom:.3g} s",
    )
    for row, name in enumerate(names):
        box.row(16 + _LANE * row, _LANE - 4, name, [b for b in bars if b.lane == name], PHASE_COLOURS)
    if handed:
        box.diamonds(16 + _LANE * len(names) + 5, [moment for moment, _ in handed], "hand-off")
    drawn = {bar.phase for bar in bars}
    for phase, colour in PHASE_COLOURS.items():
        if phase in drawn:
            box.key(phase, colour)
    box.flips(frame.flips, named=True)
    parts += box.parts()
    return y + height + 38
