"""Both phases over prompt length, batch and context: time, rates, memory, beside what arithmetic predicted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.compare import with_range
from splitwiser_lab.measure.phases import phase_spans
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.predict.kernels import Kernels, measure_kernels
from splitwiser_lab.predict.roofline import bound, least_seconds, predict_seconds
from splitwiser_lab.predict.work import Part, Work, decode, prefill, work
from splitwiser_lab.timeline import Phase

SCHEMA = "splitwiser-lab/phases/1"


@dataclass(frozen=True)
class PhaseTiming:
    """One phase at one shape: samples in seconds, their work, and what was predicted before.

    `tokens` is the prompt's length, or for decode the context in the middle of the steps. A sample of prefill is
    all prompts of the batch, one of decode a single step. `kv_bytes` is what the batch holds in the pool.
    """

    phase: Phase
    tokens: int
    batch: int
    samples: tuple[float, ...]
    work: Work
    kv_bytes: int
    least_s: float
    predicted_s: float
    bound: str

    @property
    def seconds(self) -> float:
        """The median sample."""
        return median(self.samples)

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens read, or new tokens written, per second."""
        return self.batch * (self.tokens if self.phase == "prefill" else 1) / self.seconds

    @property
    def flops_per_s(self) -> float:
        """Useful arithmetic."""
        return self.work.flops / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Useful traffic with memory."""
        return self.work.bytes / self.seconds

    @property
    def error(self) -> float:
        """How far off the prediction was: 0.1 is 10 % too long, -0.1 10 % too short."""
        return self.predicted_s / self.seconds - 1


@dataclass(frozen=True)
class PhaseProfile:
    """The timings of one model, what this machine's kernels reach, and where all of it was measured."""

    model: str
    timings: tuple[PhaseTiming, ...]
    kernels: Kernels
    origin: dict[str, Any]

    def of(self, phase: Phase) -> list[PhaseTiming]:
        """The timings of one phase."""
        return [timing for timing in self.timings if timing.phase == phase]

    def rows(self) -> list[dict[str, Any]]:
        """One row per phase and shape, ready for a table; ms as median (lowest–highest)."""
        return [
            {
                "phase": t.phase,
                "tokens each": t.tokens,
                "batch": t.batch,
                "ms": with_range([1e3 * seconds for seconds in t.samples], 0 if t.seconds > 0.1 else 1),
                "predicted ms": t.predicted_s * 1e3,
                "tok/s": t.tokens_per_s,
                "FLOP/byte": t.work.intensity,
                "GFLOP/s": t.flops_per_s / 1e9,
                "GB/s": t.bytes_per_s / 1e9,
                "KV MB": t.kv_bytes / 1e6,
                "bound by": t.bound,
            }
            for t in self.timings
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, ready for JSON."""
        ceilings = self.kernels.ceilings
        roofs = {"flops_per_s": ceilings.flops_per_s, "bytes_per_s": ceilings.bytes_per_s, "dtype": ceilings.dtype}
        rows = [
            {
                **{"phase": t.phase, "tokens": t.tokens, "batch": t.batch, "samples_s": list(t.samples)},
                **{"flops": t.work.flops, "bytes": t.work.bytes, "kv_bytes": t.kv_bytes},
                **{"least_s": t.least_s, "predicted_s": t.predicted_s, "bound": t.bound},
            }
            for t in self.timings
        ]
        return {"schema": SCHEMA, "model": self.model, "ceilings": roofs, "rows": rows, **self.origin}


def profile_phases(
    engine: Engine,
    prompt_tokens: Sequence[int] = (64, 256, 512),
    batches: Sequence[int] = (1, 8),
    *,
    new_tokens: int = 9,
    repeats: int = 3,
    kernels: Kernels | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> PhaseProfile:
    """Time both phases for every prompt length with every batch size; prompts are random tokens.

    Decode runs behind the prefill of the same prompts, so their length is its context. The mode is `sequential`
    meanwhile. `kernels`, what predictions rest on, are measured first where they are not given. Raises RequestError
    for fewer than 2 new tokens, a batch or number of repeats below 1, or prompts too long for the engine.
    """
    if kernels is None:
        report("kernels of this machine")
        kernels = measure_kernels(engine.config, engine.device, str(engine.dtype).removeprefix("torch."))
    draw, before, found = random.Random(0), engine.mode, list[PhaseTiming]()
    engine.set_mode("sequential")
    try:
        for batch in batches:
            for length in prompt_tokens:
                report(f"{batch} × {length} tokens")
                tokens = [draw.randrange(10, engine.config.vocab_size) for _ in range(length)]
                runs = phase_spans(engine, tokens, new_tokens, batch, repeats)
                together = [prefill(length, span.sequences) for span in runs[0][0]]  # as the engine grouped them
                whole = [sum(span.seconds for span in prefills) for prefills, _ in runs]
                steps = [span.seconds for _, spans in runs for span in spans]
                context = length + new_tokens // 2
                shape = (engine.config, engine.dtype.itemsize, kernels, batch)
                found.append(_timing("prefill", length, whole, together, *shape))
                found.append(_timing("decode", context, steps, [decode(context, batch)], *shape))
    finally:
        engine.set_mode(before)
    found.sort(key=lambda timing: (timing.phase != "prefill", timing.batch, timing.tokens))
    return PhaseProfile(engine.model.name, tuple(found), kernels, provenance(engine.device))


def _timing(
    phase: Phase,
    tokens: int,
    samples: Sequence[float],
    batches: Sequence[Sequence[Part]],
    config: ModelConfig,
    itemsize: int,
    kernels: Kernels,
    batch: int,
) -> PhaseTiming:
    """One timing whose sample consists of these batches, run one after the other."""
    works = [work(config, parts, itemsize) for parts in batches]
    whole = Work(tuple(operator for each in works for operator in each.operators))
    return PhaseTiming(
        phase,
        tokens,
        batch,
        tuple(samples),
        whole,
        batch * tokens * config.kv_bytes_per_token(itemsize),
        least_seconds(whole, kernels.ceilings),
        sum(predict_seconds(config, parts, kernels, itemsize) for parts in batches),
        bound(whole, kernels.ceilings),
    )
