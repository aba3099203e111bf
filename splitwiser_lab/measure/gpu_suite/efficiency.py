"""Both phases alone against what the machine can do at most, measured a moment before.

Prefill in FLOP/s of the matrix products' rate, decode in bytes/s of the rate at which memory is read; both
count the least work of a batch (see `predict.work`), so that waste lowers the share.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.achieved import span_work
from splitwiser_lab.measure.gpu_suite.job import Job, summary
from splitwiser_lab.timeline import Span

_STEPS = 24  # decode steps in one run
_PREFILLS = 6  # in one round


def efficiency(job: Job) -> None:
    """Prefill of one prompt; decode at the plan's batches and contexts, with equal and with ragged lengths."""
    engine, draw = job.engine, random.Random(0)
    engine.set_mode("sequential")
    prefills: list[Span] = []
    decodes: dict[tuple[int, int, str], list[Span]] = {}
    periods: dict[tuple[int, int, str], list[float]] = {}
    lasted: dict[tuple[int, int, str], float] = {}
    wanted = [
        (batch, context, kind)
        for batch, context in job.plan.decodes
        for kind in ("equal", "ragged")
        if batch * (context + 2 * _STEPS) <= engine.pool.tokens and 1.5 * context + _STEPS <= engine.longest_request
    ]
    for number in range(job.repeats + 1):  # round 0 warms up
        job.report(f"{job.shape}: phases alone, round {number} of {job.repeats}")
        for _ in range(_PREFILLS):
            spans = engine.generate([_prompt(engine, job.plan.prefill_tokens, draw)], 1, ignore_eos=True).timeline.spans
            prefills += spans[:1] if number else ()
        for case in wanted:
            batch, context, kind = case
            if not job.time_for(f"decode {batch}@{context}, {kind}, round {number}", lasted.get(case, 0.0)):
                continue
            begun = time.monotonic()
            with job.trying(f"decode {batch}@{context}, {kind}"):
                spread = 0.5 if kind == "ragged" else 0.0
                lengths = [round(context * draw.uniform(1 - spread, 1 + spread)) for _ in range(batch)]
                result = engine.generate([_prompt(engine, n, draw) for n in lengths], _STEPS, ignore_eos=True)
                full = [s for s in result.timeline.spans if s.phase == "decode" and s.sequences == batch]
                if number:
                    decodes.setdefault(case, []).extend(full)
                    periods.setdefault(case, []).extend(b.start - a.start for a, b in pairwise(full))
            lasted[case] = time.monotonic() - begun
    if prefills:
        _add(job, "prefill", 1, job.plan.prefill_tokens, "equal", prefills, [])
    for (batch, context, kind), found in decodes.items():
        _add(job, "decode", batch, context, kind, found, periods[batch, context, kind])


def _prompt(engine: Engine, length: int, draw: random.Random) -> list[int]:
    return draw.choices(range(10, engine.config.vocab_size), k=length)


def _add(job: Job, phase: str, batch: int, tokens: int, kind: str, spans: list[Span], periods: list[float]) -> None:
    """One row: time on the device, rate of the useful work, and its share of the ceiling."""
    config, itemsize = job.engine.config, job.engine.dtype.itemsize
    rates = []
    for span in spans:
        work = span_work(span, config, itemsize)
        assert work is not None, "the engine records what its batches cost"
        rates.append((work.flops if phase == "prefill" else work.bytes) / span.seconds)
    ceiling = job.ceilings.flops_per_s if phase == "prefill" else job.ceilings.bytes_per_s
    job.add(
        phase=phase,
        batch=batch,
        tokens=tokens,
        lengths=kind,
        ms=summary([span.seconds * 1e3 for span in spans]),
        period_ms=summary([period * 1e3 for period in periods]) if periods else None,
        rate=summary(rates),
        unit="FLOP/s" if phase == "prefill" else "B/s",
        ceiling=ceiling,
        share=summary([rate / ceiling for rate in rates]),
    )
