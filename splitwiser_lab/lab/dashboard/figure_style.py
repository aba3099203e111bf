"""What both drawings of the live view share: titles and colours. None of the colours of lines is a phase's."""

from __future__ import annotations

from collections.abc import Iterable

LINE_COLOURS = ("#009E73", "#999933", "#56B4E9", "#882255")  # of hardware
LINE_DASHES = ("solid", "dot", "dash", "dashdot")
KV_COLOUR = "#009E73"
TITLES = (
    "hardware (%)",
    "tokens per second",
    "ITL, gap between tokens (ms)",
    "KV pool in use (%)",
    "lanes",
)
_LANES = ("main", "prefill", "decode")
NO_READINGS = "no readings of the hardware were recorded"


def lane_order(names: Iterable[str]) -> list[str]:
    """Each lane once, in the same order whenever it is drawn: the usual ones first."""
    known = {name: place for place, name in enumerate(_LANES)}
    return sorted(set(names), key=lambda name: (known.get(name, len(known)), name))
