"""How fast each phase runs on a lane of its own, as FLOP/s and bytes/s to hold against the ceilings.

Batches go to a lane directly, without scheduling: a phase in its steady state, with the next batch
submitted before the last is read wherever the lane allows it. What a batch takes is the time between
the ends of two batches, so nothing that delays the device is left out.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.errors import RequestError
from splitwiser_lab.lanes.base import Lane, Ticket
from splitwiser_lab.model.batch import GREEDY, PENDING, Batch
from splitwiser_lab.model.batch import Sequence as Part
from splitwiser_lab.predict.work import parts_of, work
from splitwiser_lab.timeline import Phase

WARM_UP = 3  # batches: the first compile kernels and capture graphs


@dataclass(frozen=True)
class PhaseRate:
    """One phase at one shape: `seconds` a batch (median; `fastest` and `slowest` are the spread), and its work.

    `flops` counts what the algorithm must compute, `bytes` what it must move at least: weights, keys and values once.
    """

    phase: Phase
    batch: int
    tokens: int
    seconds: float
    fastest: float
    slowest: float
    repeats: int
    flops: float
    bytes: float

    @property
    def flops_per_s(self) -> float:
        """Floating-point operations per second."""
        return self.flops / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds


def prefill_rate(engine: Engine, tokens: int, batch: int = 1, repeats: int = 10) -> PhaseRate:
    """Prefill of `batch` prompts of so many tokens in one batch. Raises RequestError when they do not fit."""
    return _rate(engine, "prefill", prefill_batches(engine, tokens, batch, repeats + WARM_UP), tokens)


def decode_rate(engine: Engine, batch: int, context: int, repeats: int = 50, ragged: bool = True) -> PhaseRate:
    """Decode of one token for `batch` sequences, each looking at about `context` tokens.

    With `ragged`, contexts are drawn evenly from half to one and a half of `context` and make the same sum.
    Raises RequestError when they do not fit into the pool.
    """
    return _rate(engine, "decode", decode_batches(engine, batch, context, repeats + 1 + WARM_UP, ragged), context)


def prefill_batches(engine: Engine, tokens: int, batch: int, count: int) -> list[Batch]:
    """`count` times the same `batch` prompts of so many tokens, to give to a lane one after the other."""
    draw = random.Random(0)
    tables = _tables(engine, [tokens] * batch)
    prompts = [[draw.randrange(engine.config.vocab_size) for _ in range(tokens)] for _ in tables]
    return [Batch([], [Part(p, 0, table, GREEDY) for p, table in zip(prompts, tables, strict=True)])] * count


def decode_batches(engine: Engine, batch: int, context: int, count: int, ragged: bool) -> list[Batch]:
    """`count` steps of the same sequences, to give to a lane one after the other."""
    contexts = _ragged(batch, context) if ragged else [context] * batch
    tables = _tables(engine, contexts)

    def step(token: int) -> Batch:
        return Batch([Part([token], c - 1, table, GREEDY) for c, table in zip(contexts, tables, strict=True)], [])

    lane = engine.new_lane("inline", "phase")
    try:
        lane.start()
        ahead = lane.depth > 1
    finally:
        lane.close()
    return [step(1), *[step(PENDING if ahead else 1)] * (count - 1)]


def _ragged(batch: int, context: int) -> list[int]:
    draw = random.Random(1)
    contexts = [draw.randint(max(context // 2, 1), context + context // 2) for _ in range(batch)]
    for i in range(abs(excess := sum(contexts) - batch * context)):
        contexts[i % batch] -= 1 if excess > 0 else -1
    return contexts


def _tables(engine: Engine, lengths: Sequence[int]) -> list[list[int]]:
    """Pages for sequences of these lengths, in no order, as they are after a while of serving."""
    if engine.kv_use:
        raise RequestError("the engine is at work: measure phases when no request is under way.")
    size = engine.pool.page_size
    need = [-(-length // size) for length in lengths]
    if sum(need) > engine.pool.pages:
        raise RequestError(
            f"{len(lengths)} sequences of up to {max(lengths)} tokens need {sum(need)} pages, the pool has "
            f"{engine.pool.pages}: load the model with kv_tokens={sum(need) * size} or more."
        )
    deck = list(range(engine.pool.pages))
    random.Random(2).shuffle(deck)
    return [[deck.pop() for _ in range(count)] for count in need]


def run_batches(lane: Lane, batches: Sequence[Batch]) -> list[float]:
    """Run them in a row, each submitted as early as the lane allows: when each ended, in the host's seconds."""
    ends: list[float] = []
    under_way: deque[Ticket] = deque()
    for batch in batches:
        if len(under_way) == lane.depth:
            ends.append(under_way.popleft().result().end)
        under_way.append(lane.submit(batch))
    return ends + [ticket.result().end for ticket in under_way]


def _rate(engine: Engine, phase: Phase, batches: list[Batch], tokens: int) -> PhaseRate:
    lane = engine.new_lane("inline", "phase")
    try:
        lane.start()
        ends = run_batches(lane, batches)
    finally:
        lane.close()
    seconds = [after - before for before, after in pairwise(ends[WARM_UP - 1 :])]
    one = batches[-1]
    load = work(engine.config, parts_of(one), engine.dtype.itemsize)
    shape = (phase, len(one.sequences), tokens)
    return PhaseRate(*shape, median(seconds), min(seconds), max(seconds), len(seconds), load.flops, load.bytes)
