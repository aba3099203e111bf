"""The page that every static picture is drawn on: an SVG that needs no script, no font and no style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from splitwiser_lab.lab.palette import INK, PAPER


def page(
    kind: str, width: float, height: float, title: str, described: str, parts: Sequence[str], letters: int = 12
) -> str:
    """An SVG of `width` × `height` pixels: `parts` on paper, with a title and a sentence for who cannot see it.

    `kind` is its class; `letters` their height in pixels, where a part does not say otherwise.
    """
    wide, high = f"{width:.0f}", f"{height:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}" role="img" viewBox="0 0 {wide} {high}" '
        f'width="{wide}" height="{high}" font-family="system-ui, sans-serif" font-size="{letters}" fill="{INK}">'
        f"<title>{escape(title)}</title><desc>{escape(described)}</desc>"
        f'<path class="page" d="M0 0H{wide}V{high}H0z" fill="{PAPER}"/>\n' + "\n".join(parts) + "</svg>"
    )


def ticks(end: float, most: int = 8) -> list[float]:
    """Round numbers from 0 to `end`, at most `most` steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(end / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * most >= end)
    return [round(i * step, 10) for i in range(math.floor(end / step + 1e-9) + 1)]
