"""Colours that all pictures share.

Every picture brings its own white page, in light and in dark front ends: so its contrasts are the same wherever it is
shown, kept in a notebook, on the web, or printed. Colours of data are those of Okabe and Ito and of Tol, told apart
with any colour vision; text is never in one of them.
"""

from __future__ import annotations

from splitwiser_lab.timeline import SpanPhase

PAPER = "#FFFFFF"
INK = "#444444"  # text, axes and marks: 9.7:1 on the paper
FAINT = "rgba(128,128,128,0.25)"  # grid lines

PHASE_COLOURS: dict[SpanPhase, str] = {"prefill": "#E69F00", "decode": "#0072B2", "mixed": "#CC79A7"}
PHASE_LABELS: dict[SpanPhase, str] = {"prefill": "prefill", "decode": "decode", "mixed": "mixed: both in one batch"}
OTHER_COLOUR = "#009E73"  # what belongs to no phase
WAITING_COLOUR = "#BBBBBB"
# Modes are not phases: their colours are the rest of the palettes, and dashes say the same again.
MODE_COLOURS = ("#009E73", "#D55E00", "#56B4E9", "#AA4499", "#999933", "#888888", "#332288")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "2px,6px")
GOOD, BAD = "#009E73", "#D55E00"  # of a sign beside a word, never alone
