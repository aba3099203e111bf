"""The most that two phases side by side can gain over taking turns: the longer one takes its time all the same.

With P and D the seconds that prefill and decode of the whole work take in turns, one process that prefills and
one that decodes need at least max(P, D): the gain is at most (P + D) / max(P, D), and 2 where the phases are
equally long. A run of a few batches needs more: nothing can be decoded during the first prefill, and nothing
is left to prefill during the last decode.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """Limits of one process that prefills and `processes` - 1 that decode, as multiples of taking turns.

    They assume that phases at the same time do not slow each other, and batches of equal size; so a measured gain
    above them means that a phase runs faster there than in turns, for instance on fewer cores or with fewer gaps.
    """

    prefill_s: float
    decode_s: float
    processes: int
    batches: int

    @property
    def steady(self) -> float:
        """For work without end."""
        return self._turns / max(self.prefill_s, self.decode_s / (self.processes - 1))

    @property
    def run(self) -> float:
        """For this run: its first prefill and its last decode have nothing beside them."""
        first_prefill, one_decode = self.prefill_s / self.batches, self.decode_s / self.batches
        most = -(-self.batches // (self.processes - 1))  # batches of the decode process that has the most
        return self._turns / max(self.prefill_s + one_decode, first_prefill + most * one_decode)

    @property
    def _turns(self) -> float:
        return self.prefill_s + self.decode_s

    def to_dict(self) -> dict[str, float]:
        """Times and limits, ready for JSON."""
        return {"prefill_s": self.prefill_s, "decode_s": self.decode_s, "steady": self.steady, "run": self.run}

    def __str__(self) -> str:
        return (
            f"prefill takes {self.prefill_s:.3g} s and decode {self.decode_s:.3g} s in turns, so that it can gain "
            f"{self.steady:.2f} at most, and {self.run:.2f} in {self.batches} batches"
        )
