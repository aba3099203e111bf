"""The exercises of the notebooks: what counts as right, why, and where to look when an answer is not.

The questions and the folded answers stand in the notebooks; solutions that depend on the machine are
computed from what was measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exercise:
    """`solution` makes the right answer from what `check` is given; numbers may be off by the share `tolerance`."""

    solution: Callable[..., Any]
    why: str
    hint: str
    tolerance: float = 0.0


EXERCISES = {
    "quickstart: tokens per step": Exercise(
        lambda prefill, decode: prefill["tokens_per_s"] * decode["ms"] / 1e3,
        "That is what a prompt gives up, in tokens, whenever one answer gets one token.",
        "Multiply a rate by a time: prefill's tokens per second by the seconds of one decode step.",
        tolerance=0.1,
    ),
    "quickstart: first to finish": Exercise(
        lambda found: min(found.runs, key=lambda run: run.figures()["duration"]).mode,
        "Smooth text and early finish are two goals: look whether the same mode won both.",
        "Compare run.figures()['duration'] for each run in found.runs, or the ends of the Gantts.",
    ),
    "quickstart: eight at once": Exercise(
        lambda: 4.75,  # machines differ: from hardly more to all of eight times
        "One reading of the weights serves eight requests. Arithmetic and attention grow, so not quite eight times.",
        "More than 1, at most 8: time_phases(...)[1]['tokens_per_s'] with batch=8, over that with batch=1.",
        tolerance=0.75,
    ),
    "split: where it lies": Exercise(
        lambda: (9, 6),
        "Position 70 is in the third page of the table (70 // 32 = 2), in row 6 (70 % 32).",
        "block_table[position // page_size], and position % page_size. Positions and rows count from 0.",
    ),
    "split: the journey": Exercise(
        lambda: 128.0,
        "32 layers × 2 × 8 heads × 128 × 2 bytes = 128 KiB a token, times 1,024 tokens.",
        "One token takes layers × 2 (keys and values) × KV heads × head dimension × bytes of a number. 1 MiB is 2**20.",
        tolerance=0.02,
    ),
    "split: swapped pages": Exercise(
        lambda: "same",
        "Each key was turned by its position (RoPE) before it was stored, and attention sums over all rows it reads: "
        "their order adds nothing. Swap in the last page, which is not full, and it goes wrong.",
        "Run the cell in the folded answer, or ask what attention knows of a key besides the key itself.",
    ),
}


def check(name: str, answer: Any, *given: Any) -> None:
    """Print whether `answer` is right, with the reason; None counts as not answered. Never raises for a wrong answer.

    `given` is what the notebook measured, where the solution depends on it. Raises KeyError for an unknown `name`.
    """
    exercise = EXERCISES[name]
    if answer is None:
        print("Not answered yet: put your answer in place of None, and run this cell again.")
    elif equal(answer, exercise.solution(*given), exercise.tolerance):
        print(f"✓ Right. {exercise.why}")
    else:
        print(f"✗ Not yet. {exercise.hint}")


def equal(answer: Any, solution: Any, tolerance: float = 0.0) -> bool:
    """Whether an answer as people write it means the solution: text in any case, numbers within `tolerance`."""
    if isinstance(solution, str):
        return str(answer).strip().casefold() == solution.casefold()
    if isinstance(solution, Sequence):
        several = isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == len(solution)
        return several and all(equal(a, s, tolerance) for a, s in zip(answer, solution, strict=True))
    try:
        return abs(float(answer) - float(solution)) <= tolerance * abs(float(solution)) + 1e-9
    except (TypeError, ValueError):
        return False
