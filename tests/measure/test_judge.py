"""The line about the tokens can say yes, no, and that nobody compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, expected, prompts_of, tiny

from splitwiser_lab.measure.judge import TokenJudge
from splitwiser_lab.measure.reference import Reference

PROMPT = prompts_of(20)[0]


@pytest.fixture
def judge() -> TokenJudge:
    return TokenJudge(Reference(tiny("llama")))


def test_says_yes_for_the_reference_s_tokens_and_for_a_beginning_of_them(judge: TokenJudge) -> None:
    tokens = expected("llama", [PROMPT], 12)[0]
    judge.learn(PROMPT, 12, True)
    judge.judge(PROMPT, tokens, 12, True)
    judge.judge(PROMPT, tokens[:5], 5, True)
    assert judge.verdict.holds is True and judge.verdict.identical == 2
    assert str(judge.verdict) == "identical: all 2 finished requests have the reference's tokens."


def test_says_no_for_one_wrong_token_and_never_again_yes(judge: TokenJudge) -> None:
    tokens = expected("llama", [PROMPT], 12)[0]
    judge.learn(PROMPT, 12, True)
    wrong = [*tokens[:7], (tokens[7] + 1) % 199, *tokens[8:]]
    judge.judge(PROMPT, wrong, 12, True)
    judge.judge(PROMPT, tokens, 12, True)
    assert judge.verdict.holds is False and judge.verdict.different == 1
    assert str(judge.verdict).startswith(
        "NOT identical: 1 of 2 finished requests differ; the latest differs from token 7"
    )


@pytest.mark.parametrize("output", [[], [1, 2]])
def test_a_request_that_ended_too_early_is_different(judge: TokenJudge, output: list[int]) -> None:
    judge.learn(PROMPT, 12, True)
    judge.judge(PROMPT, expected("llama", [PROMPT], 12)[0][: len(output)], 12, True)
    assert judge.verdict.holds is False


def test_what_nobody_asked_the_reference_about_counts_as_unknown(judge: TokenJudge) -> None:
    judge.judge(PROMPT, [1, 2, 3], 3, True)
    assert judge.verdict.holds is None and judge.verdict.unknown == 1
    assert "1 more were not compared" in str(judge.verdict)


def test_the_reference_is_asked_once_per_prompt(judge: TokenJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = Reference.tokens

    def count(self: Reference, prompt: Any, new_tokens: int, ignore_eos: bool = False) -> list[int]:
        asked.append(new_tokens)
        return real(self, prompt, new_tokens, ignore_eos)

    monkeypatch.setattr(Reference, "tokens", count)
    for new_tokens in (8, 4, 8, 12):
        judge.learn(PROMPT, new_tokens, True)
    assert asked == [8, 12]


def test_half_precision_explains_only_what_lies_within_its_rounding() -> None:
    judge = TokenJudge(Reference(build("llama").to(torch.bfloat16)))
    judge.learn(PROMPT, 6, True)
    theirs = judge._known[tuple(PROMPT), True][1]
    far = [(theirs[0] + 1) % 199, *theirs[1:]]
    judge.judge(PROMPT, far, 6, True)
    check = judge._check(PROMPT, far, theirs)
    assert judge.verdict.explained == check.explained and judge.verdict.different == (not check.explained)
    assert (judge.verdict.holds is False) == (not check.explained)
