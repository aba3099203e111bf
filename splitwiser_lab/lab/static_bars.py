"""A few labelled bars as a small SVG, without any library: the other static picture beside the Gantt."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from splitwiser_lab.lab.palette import INK, OTHER_COLOUR, PHASE_COLOURS
from splitwiser_lab.lab.report import number
from splitwiser_lab.lab.svg import page

_ROW, _BAR = 30, 20  # heights in pixels
_LETTER = 6.8  # width in pixels, on average, at 12 pixels height


def bars_svg(
    values: Mapping[str, float],
    unit: str,
    title: str = "",
    guess: float | None = None,
    note: str = "",
    width: int = 760,
) -> str:
    """Draw `values` (label -> value, in `unit`) as horizontal bars from 0, a `guess` above them in outline.

    A label that begins with a phase's name has the phase's colour, one that ends with "predicted" a hollow bar.
    `note` stands below. `width` in pixels. Raises ValueError when there is no value.
    """
    if not values:
        raise ValueError("there is no value to draw: give {label: value}")
    rows = ([("your guess", guess)] if guess is not None else []) + list(values.items())
    written = {label: f"{_plain(value)} {unit}".strip() for label, value in rows}
    left = 14 + _LETTER * max(len(label) for label in written)
    room = width - left - 14 - _LETTER * max(len(text) for text in written.values())
    longest = max([value for _, value in rows if value > 0], default=1.0)
    parts, y = [], 8.0
    if title:
        parts.append(f'<text x="{left:.1f}" y="18" font-size="14" font-weight="600">{escape(title)}</text>')
        y = 32.0
    for label, value in rows:
        long, middle = max(0.0, room * value / longest), y + _BAR / 2 + 4
        parts.append(f'<text x="{left - 8:.1f}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        parts.append(_bar(label, left, y, long))
        parts.append(f'<text x="{left + long + 8:.1f}" y="{middle:.1f}">{escape(written[label])}</text>')
        y += _ROW
    parts.append(f'<path d="M{left:.1f} {y - len(rows) * _ROW - 4:g}V{y - 6:g}" stroke="{INK}"/>')
    if note:
        y += 12
        parts.append(f'<text x="{left:.1f}" y="{y:.1f}" font-style="italic">{escape(note)}</text>')
    described = "; ".join(f"{label}: {text}" for label, text in written.items()) + (f". {note}" if note else "")
    return page("bars", width, y + 8, title or "Measured", described, parts)


def _plain(value: float) -> str:
    """As people read it, and whole numbers without a point."""
    return number(int(value)) if value == int(value) else number(float(value))


def _bar(label: str, x: float, y: float, long: float) -> str:
    box = f'<rect x="{x:.1f}" y="{y:g}" width="{max(long, 1.0):.1f}" height="{_BAR}"'
    if label == "your guess":
        return f'{box} fill="{INK}" fill-opacity="0.12" stroke="{INK}" stroke-dasharray="4 3"/>'
    colour = next((colour for phase, colour in PHASE_COLOURS.items() if label.startswith(phase)), OTHER_COLOUR)
    hollow = ' fill-opacity="0.15" stroke-width="1.5"' * label.endswith("predicted")
    return f'{box} fill="{colour}" stroke="{colour}"{hollow}/>'
