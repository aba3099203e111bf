"""What both drawings of the live view share: titles and colours. None of the colours of lines is a phase's."""

from __future__ import annotations

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
NO_READINGS = "no readings of the hardware were recorded"
