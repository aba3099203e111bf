"""The overlap gain in a steady state: what both phases get done together, against each of them alone.

    gain = prefill rate / prefill rate alone + decode rate / decode rate alone

Taking turns gives 1, perfect overlap 2. "Alone" is the same engine in `sequential` mode, with the whole
machine, doing only that phase; all three runs are taken by turns, in the same process, after a warm-up. Prompts
are prefilled one by one, with more of them waiting than run ahead: a phase that alone had to wait for its next
batch would be called slow, and every gain large.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import numpy as np

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import SplitwiserError
from splitwiser_lab.measure.mode_spec import ModeSpec
from splitwiser_lab.metrics import rate

Load = Literal["prefill", "decode", "both"]
WARM_UP_SECONDS = 0.3
_PATIENCE = 4  # prompts that may pass a decode that gets no turn
WAITING = 4  # prompts that wait or are under way: more than the two that a GPU's lane runs ahead


@dataclass(frozen=True)
class Overlap:
    """One measurement: rates in tokens per second, alone and together."""

    mode: str
    prefill_alone: float
    decode_alone: float
    prefill: float
    decode: float

    @property
    def gain(self) -> float:
        """Prefill's share of its rate alone plus decode's."""
        return self.prefill / self.prefill_alone + self.decode / self.decode_alone

    @property
    def decode_slowdown(self) -> float | None:
        """How many times longer a decode step takes than alone; None when decode got nothing done."""
        return self.decode_alone / self.decode if self.decode else None


@dataclass(frozen=True)
class Shape:
    """The load: prompts of `prefill_tokens` always wait, `decode_batch` requests of `context` tokens decode."""

    prefill_tokens: int = 512
    decode_batch: int = 1
    context: int = 512

    def __str__(self) -> str:
        return f"prefill {self.prefill_tokens} with decode {self.decode_batch}@{self.context}"


def measure_overlap(
    engine: Engine,
    modes: Sequence[str],
    prefill_tokens: int = 512,
    decode_batch: int = 1,
    context: int = 512,
    seconds: float = 3.0,
    repeats: int = 3,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Overlap]]:
    """Measure each mode `repeats` times, interleaved: per round, each phase alone and then every mode with both.

    Prompts of `prefill_tokens` are always waiting; `decode_batch` requests of `context` tokens decode all
    the while. Each run lasts `seconds` after it has settled. The engine is left in its present mode. A mode may
    carry options: `"chunked:chunk_tokens=256"`. `report` is told what happens next.
    """
    before, found = engine.mode, {mode: [] for mode in modes}  # type: tuple[str, dict[str, list[Overlap]]]
    shape = Shape(prefill_tokens, decode_batch, context)
    for number in range(repeats + 1):
        window = seconds if number else WARM_UP_SECONDS
        turn = f"overlap gain, round {number} of {repeats}" if number else "overlap gain, warming up"
        report(f"{turn}: each phase alone")
        alone = rates_alone(engine, shape, window)
        for mode in modes:
            report(f"{turn}: {mode}")
            overlap = overlap_in(engine, mode, shape, window, alone)
            if number:  # round 0 warms up
                found[mode].append(overlap)
    engine.set_mode(before)
    return found


def measure_limit(
    engine: Engine,
    mode: str,
    prefill_tokens: int = 512,
    decode_batch: int = 1,
    context: int = 512,
    seconds: float = 3.0,
    repeats: int = 3,
) -> list[float]:
    """The most that the overlap gain of `mode` could be: each phase alone on its lane, over alone on the machine.

    What is missing from here to the gain is what the phases take from each other: bandwidth, caches, clocks.
    """
    before, limits = engine.mode, []
    shape = Shape(prefill_tokens, decode_batch, context)
    for number in range(repeats + 1):
        window = seconds if number else WARM_UP_SECONDS
        limit = limit_in(engine, mode, shape, window, rates_alone(engine, shape, window))
        if number:  # round 0 warms up
            limits.append(limit)
    engine.set_mode(before)
    return limits


def rates_alone(engine: Engine, shape: Shape, seconds: float, mode: str = "sequential") -> tuple[float, float]:
    """Prefill and decode tokens per second in `mode`, each with nothing beside it; leaves the engine in that mode."""
    _set(engine, mode, shape)
    return _run(engine, "prefill", shape, seconds)[0], _run(engine, "decode", shape, seconds)[1]


def overlap_in(engine: Engine, mode: str, shape: Shape, seconds: float, alone: tuple[float, float]) -> Overlap:
    """Both phases in `mode` (as `ModeSpec.parse` reads it), against `rates_alone` of a moment before."""
    _set(engine, mode, shape)
    return Overlap(mode, *alone, *_run(engine, "both", shape, seconds))


def limit_in(engine: Engine, mode: str, shape: Shape, seconds: float, alone: tuple[float, float]) -> float:
    """One round of `measure_limit`, against `rates_alone` of a moment before; leaves the engine in `mode`."""
    lane = rates_alone(engine, shape, seconds, mode)
    return lane[0] / alone[0] + lane[1] / alone[1]


def _set(engine: Engine, mode: str, shape: Shape) -> None:
    """Set a mode in which a prefill batch holds one prompt."""
    spec = ModeSpec.parse(mode)
    replace(spec, options={"prefill_tokens": shape.prefill_tokens, **spec.options}).set(engine)


def median_gain(measured: Sequence[Overlap]) -> float:
    """The median over repeats."""
    return median(overlap.gain for overlap in measured)


def _run(engine: Engine, load: Load, shape: Shape, seconds: float) -> tuple[float, float]:
    """Prefill and decode tokens per second under a steady load of one phase or of both."""
    prefill_tokens, decode_batch, context = shape.prefill_tokens, shape.decode_batch, shape.context
    draw = np.random.default_rng(0)
    live: set[Request] = set()
    window = {"start": 0.0, "end": float("inf")}
    settled = {"prefill": load == "decode", "decode": load == "prefill"}
    done = {"prefill": 0, "decode": 0}
    decoding: set[int] = set()
    starved_after = 1 if engine.mode == "sequential" else _PATIENCE

    def prompt(length: int) -> list[int]:
        tokens: list[int] = draw.integers(10, engine.config.vocab_size, length).tolist()  # quick: the lanes wait
        return tokens

    def submit(length: int, new: int, phase: str) -> None:
        def on_token(request: Request, _: int) -> None:
            now = time.perf_counter()
            # Settled: every one of the requests that decode has begun to, and a prompt came through beside them.
            if phase == "decode" and len(request.output) > 1:
                decoding.add(request.id)
            settled[phase] = settled[phase] or phase == "prefill" or len(decoding) >= decode_batch
            done[phase] += request.done
            # Where decode starves behind prefill (one lane in turns), nothing would settle it: prefill does.
            settled["decode"] = settled["decode"] or done["prefill"] >= starved_after
            if not window["start"] and all(settled.values()):
                window.update(start=now, end=now + seconds)
            over = now > window["end"]
            if request.done and not over:
                submit(length, new, phase)
            if over:
                for other in [other for other in live if not other.done]:
                    engine.cancel(other)

        live.add(engine.submit(prompt(length), max_new_tokens=new, ignore_eos=True, on_token=on_token))

    if load != "prefill":
        room = min(engine.config.context, engine.pool.tokens // decode_batch) - context
        for _ in range(decode_batch):
            submit(context, max(room, 1), "decode")
    if load != "decode":
        for _ in range(WAITING):
            submit(prefill_tokens, 1, "prefill")
    origin = time.perf_counter()
    try:
        engine.run()
    finally:  # after an error or an interrupt: nobody else is to carry these out
        for request in live:
            engine.cancel(request)
    if error := next((request.error for request in live if request.error is not None), None):
        raise error
    if not window["start"]:
        raise SplitwiserError(f"{load} at {shape} in mode {engine.mode} ended before it had settled.")
    timeline = engine.timeline(origin)
    start, end = window["start"] - origin, min(window["end"] - origin, timeline.duration)
    return rate(timeline, "prefill", start, end), rate(timeline, "decode", start, end)
