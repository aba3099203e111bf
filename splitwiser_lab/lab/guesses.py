"""A guess made before a measurement, and the measurement, in one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from splitwiser_lab.lab.display import show
from splitwiser_lab.lab.static_bars import bars_svg

_CLOSE = 0.1  # a guess within 10 % is called close


def reveal(guess: Any, values: Mapping[str, float], unit: str, title: str = "", of: str | None = None) -> None:
    """Draw a `guess` and the measured `values` (label -> value, in `unit`) as bars, and say how far off it was.

    `of` is the label of the value that was guessed; the last one if it is None. A guess that is not a number
    of 0 or more counts as not made yet. Raises ValueError when there is nothing to draw.
    """
    if not values:
        raise ValueError("there is no measured value to draw: give {label: value}")
    target = list(values)[-1] if of is None else of
    number = as_number(guess)
    show(bars_svg(values, unit, title, number, verdict(number, values[target], unit)))


def bars(values: Mapping[str, float], unit: str, title: str = "") -> None:
    """Draw `values` (label -> value, in `unit`) as bars, where nothing is there to be guessed."""
    show(bars_svg(values, unit, title))


def verdict(guess: float | None, value: float, unit: str) -> str:
    """One sentence on how a guess compares with the measured value."""
    if guess is None:
        return "No guess yet: write a number above, and run both cells again."
    if guess == value or (value and abs(guess / value - 1) <= _CLOSE):
        return "Your guess is within 10 % of what was measured."
    if guess <= 0 or value <= 0:
        return f"You guessed {guess:.4g} {unit}, and {value:.4g} {unit} was measured."
    factor = max(guess / value, value / guess)
    times = f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"
    return f"What was measured is {times} times {'your guess' if value > guess else 'smaller than your guess'}."


def as_number(value: Any) -> float | None:
    """A finite number of 0 or more as a float; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
