"""The roofline of a batch: how long it takes at least, how long it will take here, what overlap can win at most.

The roofline is that of Williams, Waterman and Patterson (CACM 52(4), 2009): no work is done faster than its
FLOPs at the rate of the arithmetic units, nor faster than its bytes at the rate of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.predict.ceilings import Ceilings
from splitwiser_lab.predict.kernels import Kernels
from splitwiser_lab.predict.work import Part, Work, numbers_between, work

Bound = Literal["compute", "memory"]
_Line = tuple[float, float, float]  # a, b, c of a x + b y = c


def least_seconds(work: Work, ceilings: Ceilings) -> float:
    """The roofline: no machine with these ceilings does this work in less."""
    return max(work.flops / ceilings.flops_per_s, work.bytes / ceilings.bytes_per_s)


def bound(work: Work, ceilings: Ceilings) -> Bound:
    """Which of the two roofs holds this work back."""
    return "compute" if work.intensity > ceilings.ridge else "memory"


def predict_seconds(config: ModelConfig, parts: Sequence[Part], kernels: Kernels, itemsize: int) -> float:
    """How long this machine will take for a batch of these parts, with its own kernels.

    Operators run one after the other, so each pays for itself: products as timed for their number of rows,
    attention by its arithmetic or its bytes, whichever is longer, small operations by the numbers that pass.
    A CPU launches and computes in turn; a GPU computes while the host launches, and waits for the slower.
    """
    batch, tokens = work(config, parts, itemsize), sum(part.tokens for part in parts)
    attention = batch.of("attention")
    device = sum(kernels.product_seconds(o.rows, o.weights) for o in batch.operators if o.weights and o.rows)
    device += max(
        attention.flops / kernels.attention_flops_per_s,
        kernels.kv_passes * attention.bytes / kernels.ceilings.bytes_per_s,
    )
    device += kernels.number_s * numbers_between(config, tokens)
    host = kernels.batch_s + kernels.layer_s * config.layers
    return max(device, host) if kernels.waits_for_host else device + host


@dataclass(frozen=True, slots=True)
class OverlapLimit:
    """The most that two phases side by side can do: each one's share of its rate alone, and their sum."""

    prefill: float
    decode: float

    @property
    def gain(self) -> float:
        """Taking turns gives 1, perfect overlap 2."""
        return self.prefill + self.decode


def overlap_limit(
    prefill: Work,
    decode: Work,
    ceilings: Ceilings,
    prefill_s: float | None = None,
    decode_s: float | None = None,
) -> OverlapLimit:
    """The largest overlap gain that the two roofs allow, when both phases share one machine.

    Alone, each phase takes its roofline's time, or `prefill_s` and `decode_s` where those were measured: a phase
    that falls short of the roofs by itself leaves more to the other. Together, their FLOPs and their bytes must fit
    under the same roofs: the best point of a linear programme in two unknowns, which lies at a corner.
    """
    alone = (prefill_s or least_seconds(prefill, ceilings), decode_s or least_seconds(decode, ceilings))
    compute = [w.flops / s / ceilings.flops_per_s for w, s in zip((prefill, decode), alone, strict=True)]
    memory = [w.bytes / s / ceilings.bytes_per_s for w, s in zip((prefill, decode), alone, strict=True)]
    roofs: list[_Line] = [
        (compute[0], compute[1], 1.0),
        (memory[0], memory[1], 1.0),
        (1.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
    ]
    corners = [_meet(one, other) for number, one in enumerate(roofs) for other in roofs[number + 1 :]]
    fit = [
        (x, y)
        for x, y in (corner for corner in corners if corner)
        if x >= 0 and y >= 0 and all(a * x + b * y <= c + 1e-9 for a, b, c in roofs)
    ]
    return OverlapLimit(*max(fit, key=sum, default=(1.0, 0.0)))


def _meet(one: _Line, other: _Line) -> tuple[float, float] | None:
    """Where two lines a x + b y = c meet; None for parallels."""
    (a, b, c), (d, e, f) = one, other
    determinant = a * e - b * d
    if abs(determinant) < 1e-12:
        return None
    return (c * e - b * f) / determinant, (a * f - c * d) / determinant
