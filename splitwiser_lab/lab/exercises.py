"""The exercises of the notebooks: what counts as right, why, and where to look when an answer is not.

The questions and the folded answers stand in the notebooks; solutions that depend on the machine are
computed from what was measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitwiser_lab.pipelines.reported import as_gain

if TYPE_CHECKING:
    from splitwiser_lab.measure.profile import PhaseProfile


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
    "phases: the batch at the ridge": Exercise(
        lambda: 206.0,
        "At the ridge, 989e12 / 4.8e12 = 206 FLOP/byte; a weight of 2 bytes gives 2 FLOPs to every sequence.",
        "A weight takes 2 bytes and makes 2 FLOPs for each sequence. The ridge is FLOP/s over bytes/s.",
        tolerance=0.05,
    ),
    "phases: one step of Llama": Exercise(
        lambda: 3.2,
        "7.5 billion weights (the table of tokens is only looked up) × 2 bytes, over 4.8 TB/s: 3.1 ms; 3.3 with it.",
        "All weights pass once: their bytes, over bytes per second.",
        tolerance=0.1,
    ),
    "phases: eight in a step": Exercise(
        lambda found: _step_seconds(found, 8) / _step_seconds(found, 1),
        "So much longer for eight times the tokens: the weights, most of the bytes, are read once for all.",
        "Compare two rows of decode at the same context: ms of batch 8 over ms of batch 1.",
        tolerance=0.1,
    ),
    "paging: pages of a request": Exercise(
        lambda: 5,
        "150 tokens in pages of 32: four are full, and 22 tokens lie in the fifth.",
        "Round up (100 + 50) / 32.",
    ),
    "paging: the last page": Exercise(
        lambda: 15.5,
        "From 0 to 31, each as likely: 15.5 on average, whatever the length. Without pages, all up to the longest.",
        "The last page of a request has 1 to 32 tokens in it. What is free in it, on average?",
        tolerance=0.05,
    ),
    "paging: trips for the weights": Exercise(
        lambda: 11,
        "28 of the 128 places are taken by decode, 100 are left: 1,024 / 100, rounded up. Read whole, one trip.",
        "How many tokens of the prompt fit into one batch beside the 28? Then round up.",
    ),
    "colocation: first token": Exercise(
        lambda found: min(found.runs, key=lambda run: run.figures()["median_ttft_ms"]).mode,
        "Compare with the longest pauses: whoever reads prompts fastest may be the one who makes others wait.",
        "Compare run.figures()['median_ttft_ms'] for each run in found.runs.",
    ),
    "colocation: gain": Exercise(
        lambda: 1.3,
        "0.6 and 0.7: in one second gets done what takes 1.3 seconds in turns.",
        "Add the two shares of the rates alone.",
        tolerance=0.01,
    ),
    "colocation: limit": Exercise(
        lambda: 1.6,
        "In a second of prefill, the bandwidth is free for 0.6 seconds: 1 + 0.6.",
        "Ask for how long, in a second of prefill at full speed, the memory bandwidth is free.",
        tolerance=0.01,
    ),
    "live: what a flip costs": Exercise(
        lambda: 0,
        "Lanes drain at a step boundary and the KV pool stays: nothing is lost, and nothing is computed twice.",
        "Look at the line about the tokens: does it speak of requests that failed, or that differ?",
    ),
    "live: first token": Exercise(
        lambda frame: frame.after.ttft_ms / frame.before.ttft_ms,
        "Above 1, the flip made readers wait longer for the first token: the price of smooth text.",
        "Divide: frame.after.ttft_ms by frame.before.ttft_ms.",
        tolerance=0.05,
    ),
    "live: under way": Exercise(
        lambda: 3,
        "Little's law: what is under way on average is the arrival rate times the time that each stays.",
        "Each second brings two requests, and each stays for 1.5 seconds.",
    ),
    "live: busy": Exercise(
        lambda: "no",
        "It counts time in which any kernel ran, with one lane at work as with two. Rates and lanes tell.",
        "Ask what the figure reads while a decode step uses a tenth of the GPU, all the time.",
    ),
    "hf: ceiling": Exercise(
        lambda: 4 / 3,
        "8 seconds in turns, and at least 6 side by side: the longer phase takes its time all the same.",
        "Divide what both take in turns by what the longer one takes.",
        tolerance=0.01,
    ),
    "hf: balance": Exercise(
        lambda prefill, decode: prefill.seconds / decode.seconds + 1,
        "Prefill makes the first token, and so many steps of decode take as long as it: then split can gain most.",
        "How many decode steps fit into one prefill? Prefill itself makes one more token.",
        tolerance=0.15,
    ),
    "hf: hand-off": Exercise(
        lambda: 755.0,
        "12 layers × 2 × 12 heads × 64 × 2 bytes are 36,864 bytes a token, times 20 × 1,024 tokens.",
        "One token takes layers × 2 (keys and values) × heads × head dimension × bytes of a number. 1 MB is 10**6.",
        tolerance=0.03,
    ),
    "hf: first token": Exercise(
        lambda results: min(results, key=lambda mode: results[mode].metrics.ttft.median),
        "Whoever decodes before it reads the next prompts lets them wait.",
        "Compare results[mode].metrics.ttft.median for each mode.",
    ),
    "rerun: latency": Exercise(
        lambda: as_gain(0.176),
        "What took 1 second takes 0.824, so that 1 / 0.824 times as much is done.",
        "Divide the old time by the new one.",
        tolerance=0.01,
    ),
    "rerun: gaps": Exercise(
        lambda: 4.0,
        "The GPU is busy for a quarter of each step: four processes fill it, and a fifth only waits.",
        "Which share of a step does the GPU work for one process? How many such shares make a whole?",
        tolerance=0.01,
    ),
    "rerun: the best": Exercise(
        lambda row: row.name,
        "It is the largest of the rows in modes replicas and split; look at where `split` stands to its ceiling, too.",
        "Look for the largest figure under × sequential, in the rows of modes replicas and split.",
    ),
    "vllm: engines": Exercise(
        lambda: 3,
        "21.6 GiB may be used and each takes 6.5: three fit, and 2.1 GiB are left over.",
        "Add up what one engine takes, and see how often that goes into 0.9 × 24 GiB.",
    ),
    "vllm: blocks": Exercise(
        lambda: 16,
        "The block in which decoding goes on is never handed over, also where the prompt fills it: 16 tokens.",
        "Whole blocks only, and the last one stays behind, full or not.",
    ),
    "vllm: gaps": Exercise(
        lambda document: (
            min(
                (row for row in document.rows if row.mode in ("sequential", "replicas", "split")),
                key=lambda row: row.figure("p99_itl_ms") or float("inf"),
            ).name
        ),
        "A decode step waits for whatever else its engine does in that step, and for the cores that it has.",
        "Compare figures(document, 'p99_itl_ms').",
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


def _step_seconds(found: PhaseProfile, batch: int) -> float:
    """A decode step of so many sequences, at the shortest context that was measured."""
    return min((t for t in found.of("decode") if t.batch == batch), key=lambda t: t.tokens).seconds


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
