"""Whether what each mode wrote can be trusted: its texts, read by transformers token by token.

In half precision the order of a sum decides which of two nearly equal tokens is picked, and batches differ from mode
to mode, so texts part. Every token of a text must be one that transformers, after the same text, puts as close to its
own choice as the dtype can tell. Texts that differ from sequential's are read first; of sequential, its first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitwiser_lab.engine.request import Request
from splitwiser_lab.measure.gpu_suite.job import Job
from splitwiser_lab.measure.reference import Reference, TokenCheck

_LOOKED_AT = 8  # differences of a mode: each costs two forward passes, one of them in float32
_OF_A_RUN = 4  # of these at most from one run, so that they come from several rates
TOKENS_SECONDS = 3.0  # kept for each mode
LOADING_SECONDS = 10.0  # to load the reference


@dataclass
class Differences:
    """The requests of one mode that were compared, how many differ, and the first few of those."""

    compared: int = 0
    differ: int = 0
    kept: list[tuple[list[int], list[int]]] = field(default_factory=list)  # prompt and text of some that differ
    seen: list[tuple[list[int], list[int]]] = field(default_factory=list)  # and of the first of all

    def compare(self, requests: Sequence[Request], theirs: Sequence[list[int]]) -> float:
        """Note where `requests` differ from what sequential wrote for them; the share that does not.

        Of those that failed, which are counted elsewhere, nothing is compared.
        """
        both = zip(requests, theirs, strict=True)
        found = [(r.prompt, list(r.output), other) for r, other in both if r.error is None]
        differing = [(prompt, ours) for prompt, ours, other in found if ours != other]
        self.compared, self.differ = self.compared + len(found), self.differ + len(differing)
        self.kept += differing[: min(_OF_A_RUN, _LOOKED_AT - len(self.kept))]
        self.seen += [(prompt, ours) for prompt, ours, _ in found[: _LOOKED_AT - len(self.seen)]]
        return 1 - len(differing) / max(len(found), 1)


def add_token_rows(job: Job, differences: dict[str, Differences]) -> None:
    """A row for each mode: how many texts differ, and of those looked at the token least to be explained."""
    reference: Reference | None = None
    for mode, found in differences.items():
        checks: list[TokenCheck] = []
        texts = [(prompt, text) for prompt, text in found.kept or found.seen if text]
        if texts and job.time_for(f"logit gaps of {mode}", 0.0 if reference else LOADING_SECONDS):
            with job.trying(f"logit gaps of {mode}"):
                reference = reference or Reference(job.engine.model.reference())
                job.report(f"{job.shape}: what transformers thinks of the tokens of {mode}")
                checks = [reference.worst_choice(prompt, text) for prompt, text in texts]
        worst = max(checks, key=lambda check: check.gap - check.resolution, default=None)
        job.add(
            part="tokens",
            mode=mode,
            requests=found.compared,
            differ=found.differ,
            looked_at=len(checks),
            largest_gap=None if worst is None else worst.gap,
            resolution_there=None if worst is None else worst.resolution,
            explained=f"{sum(check.explained for check in checks)} of {len(checks)}" if checks else "",
        )
