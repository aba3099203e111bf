"""Both phases alone against what the machine can do at most, measured a moment before.

Prefill in FLOP/s of the matrix products' rate, decode in bytes/s of the rate at which memory is read; both
count the least work of a batch (see `predict.work`), so that waste lowers the share.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from splitwiser_lab.measure.gpu_suite.job import Job, summary
from splitwiser_lab.measure.phase_rates import PhaseRate, decode_rate, prefill_rate

_BATCHES = 20  # in one round


def efficiency(job: Job) -> None:
    """Prefill of one prompt; decode at the plan's batches and contexts, with equal and with ragged lengths."""
    engine = job.engine
    engine.set_mode("sequential")
    cases: dict[str, Callable[[], PhaseRate]] = {
        f"prefill, 1@{job.plan.prefill_tokens}, equal": lambda: prefill_rate(engine, job.plan.prefill_tokens)
    }
    for batch, context in job.plan.decodes:
        for kind in ("equal", "ragged"):

            def measure(batch: int = batch, context: int = context, ragged: bool = kind == "ragged") -> PhaseRate:
                return decode_rate(engine, batch, context, _BATCHES, ragged)

            cases[f"decode, {batch}@{context}, {kind}"] = measure
    found: dict[str, list[PhaseRate]] = {name: [] for name in cases}
    lasted: dict[str, float] = {}
    for number in range(job.repeats):
        for name, case in list(cases.items()):
            if not job.time_for(f"{name}, round {number + 1}", lasted.get(name, 0.0)):
                continue
            job.report(f"{job.shape}: {name}, round {number + 1} of {job.repeats}")
            begun, before = time.monotonic(), len(job.left_out)
            with job.trying(name):
                found[name].append(case())
            if len(job.left_out) > before:
                del cases[name]
            lasted[name] = time.monotonic() - begun
    for name, rates in found.items():
        if rates:
            _add(job, name.rpartition(", ")[2], rates)


def _add(job: Job, lengths: str, rounds: list[PhaseRate]) -> None:
    """One row: time of a batch, rate of the useful work, and its share of the ceiling; each sample is a median."""
    one = rounds[0]
    prefill = one.phase == "prefill"
    rates = [r.flops_per_s if prefill else r.bytes_per_s for r in rounds]
    ceiling = job.ceilings.flops_per_s if prefill else job.ceilings.bytes_per_s
    job.add(
        phase=one.phase,
        batch=one.batch,
        tokens=one.tokens,
        lengths=lengths,
        ms=summary([r.seconds * 1e3 for r in rounds]),
        batches_each=one.repeats,
        rate=summary(rates),
        unit="FLOP/s" if prefill else "B/s",
        ceiling=ceiling,
        share=summary([rate / ceiling for rate in rates]),
    )
