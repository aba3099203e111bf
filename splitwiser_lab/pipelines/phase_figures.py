"""What one phase does to the machine while it runs alone: time, rate, SMs, memory. Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from splitwiser_lab.measure.compare import with_range
from splitwiser_lab.timeline import Phase


@dataclass(frozen=True)
class PhaseFigures:
    """One phase of a batch of `batch` prompts of `tokens` tokens, again and again with nothing beside it.

    A sample is the whole prefill, or one decode step, in seconds of the host. `sm_percent` and `dram_percent` are
    what the GPU counts (SMs at work, memory bandwidth of its peak), `memory_gb` what is in use on the device,
    `kv_bytes` what the batch's keys and values take at the end of the phase. None is N/A, for the reason in `missing`.
    """

    phase: Phase
    batch: int
    tokens: int
    samples_s: tuple[float, ...]
    kv_bytes: int
    sm_percent: float | None = None
    dram_percent: float | None = None
    memory_gb: float | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The median sample."""
        return median(self.samples_s)

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens read, or new tokens written, per second."""
        return self.batch * (self.tokens if self.phase == "prefill" else 1) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"seconds": self.seconds, "tokens_per_s": self.tokens_per_s}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> PhaseFigures:
        """Read back what `to_dict` gave."""
        kept = {name: raw[name] for name in cls.__dataclass_fields__}
        return cls(**kept | {"samples_s": tuple(raw["samples_s"])})


def phase_rows(phases: Sequence[PhaseFigures]) -> list[dict[str, str]]:
    """One row for each phase, ready for a table; ms as median (lowest–highest)."""
    return [
        {
            "alone": p.phase,
            "batch": f"{p.batch:,}",
            "tokens each": f"{p.tokens:,}",
            "ms": with_range([1e3 * s for s in p.samples_s], 1),
            "tok/s": f"{p.tokens_per_s:,.0f}",
            "SMs at work %": _shown(p.sm_percent),
            "DRAM bandwidth %": _shown(p.dram_percent),
            "memory in use GB": _shown(p.memory_gb),
            "KV MB": _shown(p.kv_bytes / 1e6),
        }
        for p in phases
    ]


def missing_reasons(phases: Sequence[PhaseFigures]) -> list[str]:
    """Why figures are N/A, each reason once."""
    return list(dict.fromkeys(f"{name}: {why}" for p in phases for name, why in p.missing.items()))


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.1f}"
