"""Watches that tokens stay those of the reference, request by request, while requests come and go.

The reference is asked once per prompt, before its requests run, for as many tokens as the longest of them wants:
greedy tokens of a shorter answer are the beginning of the longer one's. It can say no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitwiser_lab.measure.reference import Reference, TokenCheck


@dataclass(frozen=True)
class Verdict:
    """How many finished requests had exactly the reference's tokens, and what became of the others.

    `explained`: they differ first where half precision cannot tell the two tokens apart. `unknown`: nobody asked
    the reference about their prompt. `example` tells of the latest that differs.
    """

    identical: int = 0
    explained: int = 0
    different: int = 0
    unknown: int = 0
    example: str = ""

    @property
    def holds(self) -> bool | None:
        """False once a difference is not explained; None while nothing was compared."""
        if self.different:
            return False
        return True if self.identical or self.explained else None

    def __str__(self) -> str:
        compared = self.identical + self.explained + self.different
        unknown = f" {self.unknown} more were not compared." if self.unknown else ""
        if not compared:
            return "no finished request to compare yet." + unknown
        if self.different:
            return f"NOT identical: {self.different} of {compared} finished requests differ; {self.example}.{unknown}"
        if self.explained:
            return (
                f"{self.identical} of {compared} finished requests have the reference's tokens; {self.explained} first "
                f"differ where the dtype cannot tell two tokens apart; {self.example}.{unknown}"
            )
        return f"identical: all {compared} finished requests have the reference's tokens.{unknown}"


class TokenJudge:
    """Compares what requests wrote with what the reference writes for the same prompt."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._known: dict[tuple[tuple[int, ...], bool], tuple[int, list[int]]] = {}
        self._checks: dict[tuple[tuple[int, ...], tuple[int, ...]], TokenCheck] = {}
        self.verdict = Verdict()

    def knows(self, prompt: Sequence[int], new_tokens: int, ignore_eos: bool) -> bool:
        """Whether the reference has been asked for this many tokens of this prompt."""
        return self._known.get((tuple(prompt), ignore_eos), (0, []))[0] >= new_tokens

    def learn(self, prompt: Sequence[int], new_tokens: int, ignore_eos: bool) -> None:
        """Ask the reference, unless it has been asked before."""
        if not self.knows(prompt, new_tokens, ignore_eos):
            tokens = self._reference.tokens(prompt, new_tokens, ignore_eos)
            self._known[tuple(prompt), ignore_eos] = (new_tokens, tokens)

    def judge(self, prompt: Sequence[int], output: Sequence[int], new_tokens: int, ignore_eos: bool) -> None:
        """Count one finished request, which was asked for `new_tokens` tokens, into the verdict."""
        now = self.verdict
        if not self.knows(prompt, new_tokens, ignore_eos):
            self.verdict = Verdict(now.identical, now.explained, now.different, now.unknown + 1, now.example)
            return
        expected = self._known[tuple(prompt), ignore_eos][1][:new_tokens]
        if list(output) == expected:
            self.verdict = Verdict(now.identical + 1, now.explained, now.different, now.unknown, now.example)
            return
        check = self._check(prompt, output, expected)
        explained, different = now.explained + check.explained, now.different + (not check.explained)
        self.verdict = Verdict(now.identical, explained, different, now.unknown, f"the latest {check}")

    def _check(self, prompt: Sequence[int], output: Sequence[int], expected: Sequence[int]) -> TokenCheck:
        """How they differ; the same difference costs the reference only one look."""
        key = tuple(prompt), tuple(output)
        if key not in self._checks:
            self._checks[key] = self._reference.check(prompt, output, expected)
        return self._checks[key]
