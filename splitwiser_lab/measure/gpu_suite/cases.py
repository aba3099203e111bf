"""The phases that are looked at alone: prefill of one prompt, and decode at the plan's batches and contexts."""

from __future__ import annotations

from dataclasses import dataclass

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.gpu_suite.plan import Plan
from splitwiser_lab.measure.phase_rates import PhaseRate, decode_batches, decode_rate, prefill_batches, prefill_rate
from splitwiser_lab.model.batch import Batch
from splitwiser_lab.timeline import Phase

_DECODE_STEPS = 20  # in one round


@dataclass(frozen=True)
class Case:
    """One phase at one shape. `lengths` of a decode batch are equal, or ragged with the same sum."""

    phase: Phase
    batch: int
    tokens: int
    lengths: str = "equal"

    def __str__(self) -> str:
        return f"{self.phase}, {self.batch}@{self.tokens}, {self.lengths}"

    def rate(self, engine: Engine) -> PhaseRate:
        """One round of it."""
        if self.phase == "prefill":
            return prefill_rate(engine, self.tokens, self.batch)
        return decode_rate(engine, self.batch, self.tokens, _DECODE_STEPS, self.lengths == "ragged")

    def batches(self, engine: Engine, count: int) -> list[Batch]:
        """So many of its batches, to give to a lane."""
        if self.phase == "prefill":
            return prefill_batches(engine, self.tokens, self.batch, count)
        return decode_batches(engine, self.batch, self.tokens, count, self.lengths == "ragged")


def cases(plan: Plan) -> list[Case]:
    """Prefill first; decode with equal and with ragged lengths."""
    decodes = [Case("decode", *shape, lengths) for shape in plan.decodes for lengths in ("equal", "ragged")]
    return [Case("prefill", 1, plan.prefill_tokens), *decodes]
