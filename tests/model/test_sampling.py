"""Tokens from logits: greedy, tempered, from the nucleus; the given random number decides and nothing else."""

from __future__ import annotations

import pytest
import torch

from splitwiser_lab.model.batch import GREEDY, NOT_A_NUMBER, SamplingSpec
from splitwiser_lab.model.sampling import sample

LOGITS = torch.tensor([[0.3, 2.0, -1.0, 2.5, 0.0, -4.0, 1.0]])
ALMOST_ONE = 1.0 - 2.0**-53  # the largest number that a generator of doubles gives


def draw(temperature: float, top_p: float, count: int) -> torch.Tensor:
    """How often each token comes, over evenly spaced random numbers: the inverse CDF leaves no noise."""
    specs = [SamplingSpec(temperature, top_p, (i + 0.5) / count) for i in range(count)]
    tokens = sample(LOGITS.repeat(count, 1), specs)
    return torch.bincount(tokens, minlength=LOGITS.shape[1]) / count


def nucleus(temperature: float, top_p: float) -> torch.Tensor:
    """The distribution as the definition has it: the fewest most probable tokens that reach top_p, renormalised."""
    weights = [float(torch.exp(logit / temperature)) for logit in LOGITS[0].double()]
    probabilities = [weight / sum(weights) for weight in weights]
    kept, reached = [0.0] * len(weights), 0.0
    for token in sorted(range(len(weights)), key=lambda t: -probabilities[t]):
        if reached >= top_p:
            break
        kept[token] = probabilities[token]
        reached += probabilities[token]
    return torch.tensor(kept) / sum(kept)


def test_greedy_takes_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, [GREEDY, GREEDY]).tolist() == [1, 0]


@pytest.mark.parametrize("spec", [GREEDY, SamplingSpec(0.8, 0.9, 0.3)])
def test_a_row_with_a_nan_has_no_token_and_the_others_have(spec: SamplingSpec) -> None:
    logits = torch.tensor([[0.0, 9.0, float("nan")], [5.0, -50.0, -50.0], [float("inf"), 0.0, 1.0]])
    rows = logits if spec is GREEDY else logits[:2]
    assert sample(rows, [spec] * len(rows)).tolist() == [NOT_A_NUMBER, 0, 0][: len(rows)]


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
def test_distribution(temperature: float, top_p: float) -> None:
    torch.testing.assert_close(draw(temperature, top_p, 4000), nucleus(temperature, top_p), rtol=0.0, atol=1e-3)


def test_top_p_cuts_after_the_token_that_reaches_it() -> None:
    probabilities = torch.softmax(LOGITS[0].double(), 0).sort(descending=True).values
    just_below, just_above = float(probabilities[:2].sum()) - 1e-6, float(probabilities[:2].sum()) + 1e-6
    assert (draw(1.0, just_below, 1000) > 0).sum() == 2
    assert (draw(1.0, just_above, 1000) > 0).sum() == 3


def test_a_tiny_top_p_is_greedy() -> None:
    assert draw(1.0, 1e-9, 100)[3] == 1.0


def test_a_low_temperature_is_greedy() -> None:
    assert draw(1e-4, 1.0, 100)[3] == 1.0


@pytest.mark.parametrize("temperature", [1e-300, 1e-320, 1e300])
def test_extreme_temperatures_give_tokens_of_the_vocabulary(temperature: float) -> None:
    """Anything that the door lets in."""
    tokens = sample(LOGITS.repeat(3, 1), [SamplingSpec(temperature, 0.9, u) for u in (0.0, 0.5, ALMOST_ONE)])
    assert all(0 <= token < LOGITS.shape[1] for token in tokens.tolist())


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("top_p", [1.0, 0.3])
def test_no_random_number_picks_an_impossible_token(uniform: float, top_p: float) -> None:
    logits = torch.full((1, 50_000), -1000.0)
    logits[0, 7], logits[0, 49_000] = 1.0, 1.1
    assert sample(logits, [SamplingSpec(1.0, top_p, uniform)]).item() in (7, 49_000)


def test_rows_in_one_batch_keep_their_own_parameters() -> None:
    specs = [
        SamplingSpec(1.3, 0.8, 0.91),
        GREEDY,
        SamplingSpec(0.7, 1.0, 0.02),
        SamplingSpec(2.0, 0.4, 0.5),
        GREEDY,
    ]
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 3
    together = sample(logits, specs).tolist()
    alone = [sample(logits[i : i + 1], [spec]).item() for i, spec in enumerate(specs)]
    backwards = sample(logits.flip(0), specs[::-1]).tolist()[::-1]
    assert together == alone == backwards


def test_rounding_noise_between_lanes_does_not_change_the_token() -> None:
    """Another batch size gives logits that differ in the last bits of float32; ties aside, the token stays."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(400, 500, generator=generator) * 3
    noisy = logits + torch.randn(400, 500, generator=generator) * 1e-6
    specs = [SamplingSpec(1.0, 0.95, (i + 0.5) / 400) for i in range(400)]
    assert (sample(logits, specs) != sample(noisy, specs)).sum() <= 1


def test_nothing_to_pick() -> None:
    assert sample(torch.empty(0, 10), []).tolist() == []
