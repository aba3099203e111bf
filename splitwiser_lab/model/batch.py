"""A batch: packed tokens of some sequences, and what attention and sampling need to know of each.

It is plain Python, small enough to travel to another process at every step, and knows no request.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitwiser_lab.timeline import SpanPhase


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How to pick one token: greedy at temperature 0, else with the given random number in [0, 1).

    The number comes with the batch, so that every lane in every process picks the same token.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    uniform: float = 0.0


GREEDY = SamplingSpec()

PENDING = -1  # stands for a token that the lane itself picked in its last batch, and that nobody has read yet

NOT_A_NUMBER = -2  # in place of a picked token: the logits hold a NaN, so that none is the largest


@dataclass(slots=True)  # not frozen, which takes twice as long to make: there is one for each row at each step
class Sequence:
    """The part of one sequence that a batch computes: `tokens` at positions `start`, `start` + 1, ...

    `block_table` names the pages of all its tokens so far, these included; its first page belongs to
    this sequence alone for as long as it runs, so a lane can know it by that. `tokens` is `[PENDING]`
    where the lane is to go on from the token that it picked for the sequence in an earlier batch.
    `sampling` is None where more of the prompt is still to come, so that no token is to be picked.
    """

    tokens: list[int]
    start: int
    block_table: list[int]
    sampling: SamplingSpec | None

    @property
    def context(self) -> int:
        """Tokens whose keys and values lie in the pool once this batch is done."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences to run in one pass: first those that decode (one token each), then those that prefill."""

    decode: list[Sequence]
    prefill: list[Sequence]

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, in the order in which their tokens are packed."""
        return self.decode + self.prefill

    @property
    def phase(self) -> SpanPhase:
        """What kind of work this is."""
        if self.decode and self.prefill:
            return "mixed"
        return "decode" if self.decode else "prefill"

    @property
    def prefill_tokens(self) -> int:
        """Tokens of prompts in the batch."""
        return sum(len(sequence.tokens) for sequence in self.prefill)

    @property
    def context_tokens(self) -> int:
        """Tokens whose keys and values the batch reads or writes."""
        return sum(sequence.context for sequence in self.sequences)

    @property
    def attended_pairs(self) -> int:
        """Pairs of a token and one it looks at: each sees all before it, and itself."""
        counts = ((len(sequence.tokens), sequence.start) for sequence in self.sequences)
        return sum(new * start + new * (new + 1) // 2 for new, start in counts)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What came of a batch: per sequence the picked token (None where none was asked for; see NOT_A_NUMBER).

    `start` and `end` are the device's, in seconds on `time.perf_counter`'s clock.
    """

    tokens: list[int | None]
    start: float
    end: float
