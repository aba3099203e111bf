"""Where the time of each phase goes, kernel by kernel: what bounds the shares that `efficiency` measures.

Matrix products and attention are held against the same ceilings, over their own time alone.
"""

from __future__ import annotations

import time

from splitwiser_lab.measure.gpu_suite.cases import Case, cases
from splitwiser_lab.measure.gpu_suite.job import Job, Row, summary
from splitwiser_lab.measure.phase_rates import WARM_UP
from splitwiser_lab.measure.phase_times import ATTENTION, PRODUCTS, REST, PhaseTimes, phase_times

_BATCHES = 8  # undisturbed, and as many profiled


def kernels(job: Job) -> None:
    """Each of the cases of `efficiency` once."""
    job.engine.set_mode("sequential")
    longest = 0.0
    for case in cases(job.plan):
        if not job.time_for(str(case), longest):
            continue
        job.report(f"{job.shape}: where the time goes, {case}")
        begun = time.monotonic()
        with job.trying(str(case)):
            _add(job, case, phase_times(job.engine, case.batches(job.engine, 2 * _BATCHES + WARM_UP)))
        longest = max(longest, time.monotonic() - begun)


def _add(job: Job, case: Case, times: PhaseTimes) -> None:
    """One row: milliseconds of a batch by kind of kernel, and what products and attention reach while they run."""
    unit, ceiling = ("FLOP/s", job.ceilings.flops_per_s)
    if case.phase == "decode":
        unit, ceiling = ("B/s", job.ceilings.bytes_per_s)
    products, attention = times.products_per_s(unit), times.attention_per_s(unit)
    job.add(
        phase=case.phase,
        batch=case.batch,
        tokens=case.tokens,
        lengths=case.lengths,
        batches=times.batches,
        ms=_value(times.seconds, 1e3),
        undisturbed_ms=_value(times.undisturbed, 1e3),
        products_ms=_value(times.by_kind[PRODUCTS], 1e3),
        attention_ms=_value(times.by_kind[ATTENTION], 1e3),
        rest_ms=_value(times.by_kind[REST], 1e3),
        idle_ms=_value(times.idle, 1e3),
        unit=unit,
        ceiling=ceiling,
        products_rate=_value(products),
        products_share=_value(products, 1 / ceiling),
        attention_rate=_value(attention),
        attention_share=_value(attention, 1 / ceiling),
        longest_ms={name: 1e3 * seconds for name, seconds in times.longest.items()},
    )


def _value(value: float | None, factor: float = 1.0) -> Row | None:
    """One sample, in the form in which calls are joined."""
    return None if value is None else summary([value * factor])
