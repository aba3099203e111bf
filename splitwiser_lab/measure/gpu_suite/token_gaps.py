"""How far apart the logits lie where a mode's tokens first differ from sequential's, as transformers computes them.

In half precision the order of a sum decides which of two nearly equal tokens is picked, and batches differ from mode
to mode. A difference is explained where the two logits are closer than the dtype can tell apart at that place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitwiser_lab.engine.request import Request
from splitwiser_lab.measure.gpu_suite.job import Job
from splitwiser_lab.measure.reference import Reference, TokenCheck

_LOOKED_AT = 8  # differences of a mode: each costs two forward passes, one of them in float32
_SECONDS = 20.0  # to load the reference, at least


@dataclass
class Differences:
    """The requests of one mode that were compared, how many differ, and the first few of those."""

    compared: int = 0
    differ: int = 0
    kept: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)  # prompt, ours, sequential's

    def compare(self, requests: Sequence[Request], theirs: Sequence[list[int]]) -> float:
        """Note where `requests` differ from what sequential wrote for them; the share that does not.

        Of those that failed, which are counted elsewhere, nothing is compared.
        """
        both = zip(requests, theirs, strict=True)
        found = [(r.prompt, list(r.output), other) for r, other in both if r.error is None]
        differing = [one for one in found if one[1] != one[2]]
        self.compared, self.differ = self.compared + len(found), self.differ + len(differing)
        self.kept += differing[: _LOOKED_AT - len(self.kept)]
        return 1 - len(differing) / max(len(found), 1)


def add_token_rows(job: Job, differences: dict[str, Differences]) -> None:
    """A row for each mode: how many requests differ, the largest gap among those looked at, and if it is explained."""
    reference: Reference | None = None
    for mode, found in differences.items():
        checks: list[TokenCheck] = []
        if found.kept and job.time_for(f"logit gaps of {mode}", 0.0 if reference else _SECONDS):
            with job.trying(f"logit gaps of {mode}"):
                reference = reference or Reference(job.engine.model.reference())
                job.report(f"{job.shape}: logit gaps where the tokens of {mode} differ")
                checks = [reference.check(prompt, ours, theirs) for prompt, ours, theirs in found.kept]
        worst = max(checks, key=lambda check: abs(check.gap), default=None)
        explained = sum(abs(check.gap) <= check.resolution for check in checks)
        job.add(
            part="tokens",
            mode=mode,
            requests=found.compared,
            differ=found.differ,
            looked_at=len(checks),
            largest_gap=None if worst is None else abs(worst.gap),
            resolution_there=None if worst is None else worst.resolution,
            explained=f"{explained} of {len(checks)}" if checks else ("" if found.differ else "no difference"),
        )
