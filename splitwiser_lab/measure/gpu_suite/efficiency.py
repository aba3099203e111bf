"""Both phases alone against what the machine can do at most, measured a moment before.

Prefill in FLOP/s of the matrix products' rate, decode in bytes/s of the rate at which memory is read; both
count the least work of a batch (see `predict.work`), so that waste lowers the share.
"""

from __future__ import annotations

import time

from splitwiser_lab.measure.gpu_suite.cases import Case, cases
from splitwiser_lab.measure.gpu_suite.job import Job, summary
from splitwiser_lab.measure.phase_rates import PhaseRate


def efficiency(job: Job) -> None:
    """Each case in every round, so that drift hits all alike."""
    job.engine.set_mode("sequential")
    going = cases(job.plan)
    found: dict[Case, list[PhaseRate]] = {case: [] for case in going}
    lasted: dict[Case, float] = {}
    for number in range(job.repeats):
        for case in list(going):
            if not job.time_for(f"{case}, round {number + 1}", lasted.get(case, 0.0)):
                continue
            job.report(f"{job.shape}: {case}, round {number + 1} of {job.repeats}")
            begun, before = time.monotonic(), len(job.left_out)
            with job.trying(str(case)):
                found[case].append(case.rate(job.engine))
            if len(job.left_out) > before:
                going.remove(case)
            lasted[case] = time.monotonic() - begun
    for case, rates in found.items():
        if rates:
            _add(job, case, rates)


def _add(job: Job, case: Case, rounds: list[PhaseRate]) -> None:
    """One row: time of a batch, rate of the useful work, and its share of the ceiling; each sample is a median."""
    prefill = case.phase == "prefill"
    rates = [r.flops_per_s if prefill else r.bytes_per_s for r in rounds]
    ceiling = job.ceilings.flops_per_s if prefill else job.ceilings.bytes_per_s
    job.add(
        phase=case.phase,
        batch=case.batch,
        tokens=case.tokens,
        lengths=case.lengths,
        ms=summary([r.seconds * 1e3 for r in rounds]),
        batches_each=rounds[0].repeats,
        rate=summary(rates),
        unit="FLOP/s" if prefill else "B/s",
        ceiling=ceiling,
        share=summary([rate / ceiling for rate in rates]),
    )
