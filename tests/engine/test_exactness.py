"""The promise: greedy tokens are those of transformers' `generate`, sampled ones those of the seed, in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import PAGE, MakeEngine
from tiny_models import FAMILIES, build, expected, generated, prompts_of, tiny

from splitwiser_lab import Engine
from splitwiser_lab.engine.request import Sampling
from splitwiser_lab.model import attention
from splitwiser_lab.model.sampling import sample

MODES: dict[str, dict[str, Any]] = {
    "sequential": {"prefill_tokens": 90},
    "chunked": {"chunk_tokens": 7},
    "processes": {"prefill_tokens": 90},
}
PROMPTS = prompts_of(1, 5, PAGE, PAGE + 1, 33, 70, 64, 100)
NEW = 20


@pytest.fixture(scope="module", params=FAMILIES)
def family_engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    """One engine per family for all modes, so that its processes start once."""
    with Engine.from_pretrained(tiny(request.param), kv_tokens=4096, page_size=PAGE) as engine:
        yield request.param, engine


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_those_of_transformers(family_engine: tuple[str, Engine], mode: str) -> None:
    family, engine = family_engine
    engine.set_mode(mode, **MODES[mode])
    result = engine.generate(PROMPTS, NEW)
    assert result.tokens == expected(family, PROMPTS, NEW)
    assert {span.mode for span in result.timeline.spans} == {mode}
    assert engine.kv_use == 0


@pytest.mark.parametrize("mode", MODES)
def test_sampled_tokens_are_those_of_the_seed(family_engine: tuple[str, Engine], mode: str) -> None:
    """Worked out anew from transformers' logits and the request's own random numbers, in any company."""
    family, engine = family_engine
    engine.set_mode(mode, **MODES[mode])
    together = engine.generate(PROMPTS, 8, temperature=1.2, top_p=0.95, seed=5).tokens
    model = tiny(family)
    for number in (0, 4, 7):
        wanted, tokens = Sampling(temperature=1.2, top_p=0.95, seed=5 + number), list(PROMPTS[number])
        for index in range(8):
            with torch.inference_mode():
                logits = model(torch.tensor([tokens])).logits[:, -1].float()
            tokens += sample(logits, [wanted.spec(index)]).tolist()
        assert together[number] == tokens[len(PROMPTS[number]) :]
        assert (
            engine.generate(PROMPTS[number], 8, temperature=1.2, top_p=0.95, seed=5 + number).tokens[0]
            == (together[number])
        )


def test_other_seeds_give_other_tokens(engine: Engine) -> None:
    runs = [engine.generate(PROMPTS[:4], 12, temperature=1.0, seed=seed).tokens for seed in (0, 100, 0)]
    assert runs[0] == runs[2]
    assert all(a != b for a, b in zip(runs[0], runs[1], strict=True))
    twice = engine.generate([PROMPTS[4], PROMPTS[4]], 12, temperature=1.0).tokens
    assert twice[0] != twice[1], "each prompt of a call has numbers of its own"


def test_the_engines_seed_is_the_default(make_engine: MakeEngine) -> None:
    tokens = make_engine(seed=11).generate(PROMPTS[:2], 8, temperature=1.0).tokens
    assert make_engine(seed=0).generate(PROMPTS[:2], 8, temperature=1.0, seed=11).tokens == tokens


def test_random_numbers_are_uniform_and_all_different() -> None:
    numbers = [Sampling(temperature=1.0, seed=seed).spec(i).uniform for seed in range(40) for i in range(50)]
    assert len(set(numbers)) == len(numbers)
    shares = torch.histc(torch.tensor(numbers), bins=10, min=0, max=1) / len(numbers)
    assert (shares - 0.1).abs().max() < 0.03


@pytest.mark.parametrize("options", [{"max_batch": 1}, {"max_batch": 3}, {"prefill_tokens": 1}], ids=str)
@pytest.mark.parametrize("mode", ["sequential", "chunked", "processes"])
def test_limits_change_no_token(engine: Engine, mode: str, options: dict[str, int]) -> None:
    engine.set_mode(mode, **options)
    assert engine.generate(PROMPTS[:6], 9).tokens == expected("llama", PROMPTS[:6], 9)


def test_limits_hold(engine: Engine) -> None:
    engine.set_mode("chunked", chunk_tokens=16, max_batch=3)
    spans = engine.generate(PROMPTS, 9).timeline.spans
    assert max(span.sequences for span in spans) == 3
    assert max(span.prefill_tokens + span.decode_tokens for span in spans) == 16
    engine.set_mode("sequential", prefill_tokens=50)
    spans = engine.generate(PROMPTS, 9).timeline.spans
    assert {span.sequences for span in spans if span.prefill_tokens > 50} == {1}, "only a long prompt goes over, alone"
    assert any(span.sequences > 1 for span in spans if span.phase == "prefill")


def test_one_token_and_the_whole_context(engine: Engine) -> None:
    assert engine.generate(PROMPTS, 1).tokens == expected("llama", PROMPTS, 1)
    (prompt,) = prompts_of(30)
    assert engine.generate(prompt, 226).tokens == [generated(tiny("llama"), prompt, 226)]


def test_end_of_sequence_ids_end_a_request() -> None:
    """Ids that transformers' generate stops at, kept in the output; some prompts end, some run on."""
    plain = expected("llama", PROMPTS, NEW)
    ends = [plain[2][3], plain[5][8]]
    model = build("llama", eos_token_id=ends)
    wanted = [generated(model, prompt, NEW, pad_token_id=0) for prompt in PROMPTS]
    with Engine.from_pretrained(model, kv_tokens=4096) as engine:
        for mode, options in MODES.items():
            engine.set_mode(mode, **options)
            result = engine.generate(PROMPTS, NEW)
            assert result.tokens == wanted
            reasons = [request.finish_reason for request in result.requests]
            assert [reason == "stop" for reason in reasons] == [output[-1] in ends for output in wanted]
            assert {"stop", "length"} == set(reasons)
        assert engine.generate(PROMPTS, NEW, ignore_eos=True).tokens == plain


def test_an_engine_made_in_inference_mode_works_outside_of_it_and_the_other_way_round(make_engine: MakeEngine):
    prompts = prompts_of(5, 9)
    with torch.inference_mode():
        engine = make_engine()
    for mode in ("sequential", "processes"):
        engine.set_mode(mode)
        assert engine.generate(prompts, 6).tokens == expected("llama", prompts, 6)
        with torch.inference_mode():
            assert engine.generate(prompts, 6).tokens == expected("llama", prompts, 6)


def test_memory_that_attention_keeps_is_writable_whoever_asked_for_it_first(make_engine: MakeEngine, monkeypatch):
    monkeypatch.setattr(attention, "_workspace", attention._Workspace())
    engine, prompts = make_engine(), prompts_of(5, 9)
    with torch.inference_mode():
        engine.generate(prompts, 6)
    assert engine.generate(prompts, 6).tokens == expected("llama", prompts, 6)
