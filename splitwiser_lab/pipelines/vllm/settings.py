"""What every engine of a run gets, whatever the mode: the knobs that make today's vLLM work as an older one did."""

from __future__ import annotations

from dataclasses import dataclass

from splitwiser_lab.errors import ModeError


@dataclass(frozen=True)
class EngineSettings:
    """eager      nothing compiled and no CUDA graphs: the host launches operator by operator (always so on a CPU)
    max_batch  requests that each engine runs at once at most; None: as many as there are
    """

    eager: bool = False
    max_batch: int | None = None

    def __post_init__(self) -> None:
        """Raises ModeError for a batch that cannot be."""
        if self.max_batch is not None and (not isinstance(self.max_batch, int) or self.max_batch < 1):
            raise ModeError(f"max_batch={self.max_batch!r}: give a whole number of requests, 1 or more.")

    def at_once(self, requests: int) -> int:
        """How many of these an engine runs at once."""
        return requests if self.max_batch is None else min(requests, self.max_batch)
