"""Where co-location pays: overlap gain and slowdown of decode, for every mechanism, split and load.

Beside the gain stands the most that it could be where each phase has a part of the device of its own: each phase
alone on its part, over alone on the whole. What is missing is what the phases take from each other.
"""

from __future__ import annotations

import time

import torch

from splitwiser_lab.engine.modes import MODES
from splitwiser_lab.measure.gpu_suite.job import Job, split_modes, summary
from splitwiser_lab.measure.overlap import WAITING, WARM_UP_SECONDS, Overlap, Shape, limit_in, overlap_in, rates_alone


def overlap_map(job: Job) -> None:
    """Each load in turn: rounds of both phases alone and then of every mode, so that drift hits all alike."""
    modes, missing = split_modes(job.engine, job.plan.splits, job.plan.chunks)
    for mode, why in missing.items():
        job.skip(mode, why)
    loads = [shape for shape in job.plan.overlaps if _fits(job, shape)]
    asked = loads[: job.loads or None]
    for shape in loads[len(asked) :]:
        job.skip(str(shape), f"only the first {job.loads} of the loads were asked for")
    for number, shape in enumerate(asked):
        share = job.seconds_left / (len(asked) - number)
        chosen = [mode for mode in modes if mode != "sequential"]
        _measure(job, chosen, shape, time.monotonic() + share, warm=number > 0)


def _measure(job: Job, modes: list[str], shape: Shape, until: float, warm: bool) -> None:
    """With `warm`, all lanes ran before, at another load: there is no round to warm up."""
    found: dict[str, list[Overlap]] = {mode: [] for mode in modes}
    limits: dict[str, list[float]] = {}
    going, slowest = list(modes), 0.0
    for number in range(int(warm), job.repeats + 1):  # round 0 warms up
        window = job.plan.overlap_seconds if number else WARM_UP_SECONDS
        job.report(f"{job.shape}: {shape}, round {number} of {job.repeats}")
        if time.monotonic() + slowest > until:
            job.skip(f"{shape}: rounds {number} to {job.repeats}", "no time")
            break
        begun = time.monotonic()
        alone = rates_alone(job.engine, shape, window)
        alone_took = time.monotonic() - begun
        last = number == job.repeats or (number and begun + 2 * slowest > until)
        for mode in list(going):
            before = len(job.left_out)
            with job.trying(f"{shape}: {mode}"):
                overlap = overlap_in(job.engine, mode, shape, window, alone)
                if number:
                    found[mode].append(overlap)
            if len(job.left_out) > before:
                going.remove(mode)
            elif last and mode not in limits and divides(mode, job.device):
                limits[mode] = _limit(job, mode, shape, alone, until - alone_took)
        slowest = max(slowest, time.monotonic() - begun)
    for mode, overlaps in found.items():
        if overlaps:
            _add(job, shape, mode, overlaps, limits.get(mode, []))


def divides(mode: str, device: str) -> bool:
    """Whether each lane of `mode` has a part of `device` of its own, so that a limit of the gain can be measured."""
    kinds = {kind for kind, _ in MODES[mode.partition(":")[0]].lanes.values()}
    return bool(kinds & {"partition", "mps"}) or ("process" in kinds and torch.device(device).type == "cpu")


def _limit(job: Job, mode: str, shape: Shape, alone: tuple[float, float], until: float) -> list[float]:
    """Measured once, right after the gain in the same mode; nothing where it failed, or would begin after `until`."""
    limits: list[float] = []
    what = f"{shape}: the limit of {mode}"
    if time.monotonic() > until:
        job.skip(what, "no time")
        return limits
    with job.trying(what):
        limits.append(limit_in(job.engine, mode, shape, job.plan.overlap_seconds, alone))
    return limits


def _add(job: Job, shape: Shape, mode: str, overlaps: list[Overlap], limits: list[float]) -> None:
    slowdowns = [overlap.decode_slowdown for overlap in overlaps]
    known = [slowdown for slowdown in slowdowns if slowdown is not None]
    job.add(
        load=str(shape),
        prefill_tokens=shape.prefill_tokens,
        decode_batch=shape.decode_batch,
        context=shape.context,
        mode=mode,
        gain=summary([overlap.gain for overlap in overlaps]),
        limit=summary(limits) if limits else None,
        decode_slowdown=summary(known) if len(known) == len(slowdowns) else None,
        prefill_share=summary([overlap.prefill / overlap.prefill_alone for overlap in overlaps]),
        prefill_alone=summary([overlap.prefill_alone for overlap in overlaps]),
        decode_alone=summary([overlap.decode_alone for overlap in overlaps]),
    )


def _fits(job: Job, shape: Shape) -> bool:
    # They grow while they decode.
    needed = shape.decode_batch * shape.context * 3 // 2 + (WAITING + 1) * shape.prefill_tokens
    if needed <= job.engine.pool.tokens and max(shape.context, shape.prefill_tokens) < job.engine.longest_request:
        return True
    job.skip(str(shape), f"it needs about {needed} tokens of KV pool, and there are {job.engine.pool.tokens}")
    return False
