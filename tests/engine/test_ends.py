"""How requests end: stop texts, cancellation from anywhere, a listener that fails. The others do not notice."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from conftest import ByteTokenizer, MakeEngine, speaking_engine
from tiny_models import CONTEXT, expected, prompts_of, tiny

from splitwiser_lab import Engine, GenerationError
from splitwiser_lab.engine.intake import Intake
from splitwiser_lab.engine.request import Request
from splitwiser_lab.model.config import ModelConfig

MODES = ["sequential", "chunked", "processes"]
PROMPTS = prompts_of(40, 12, 25, 60)
NEW = 40
POISON = 197  # a token that none of the prompts holds, and no request writes


@pytest.fixture(scope="module")
def speaking() -> Iterator[Engine]:
    """An engine with a tokenizer, for texts."""
    with speaking_engine() as engine:
        yield engine


# -- stop texts


def test_stop_text_ends_and_is_cut(speaking: Engine) -> None:
    """At every place in the text: the request ends with the first token that completes the stop text."""
    prompt = PROMPTS[0]
    whole = speaking.generate(prompt, NEW)
    text, tokens, decode = whole.texts[0], whole.tokens[0], speaking.tokenizer.decode
    tried = 0
    for at in range(1, len(text) - 4):
        stop = text[at : at + 3]
        if "\ufffd" in stop:
            continue
        tried += 1
        result = speaking.generate(prompt, NEW, stop=["never to be seen", stop])
        shortest = next(n for n in range(NEW + 1) if stop in decode(tokens[:n]))
        assert result.tokens[0] == tokens[:shortest]
        assert result.texts[0] == text[: text.index(stop)]
        assert result.requests[0].finish_reason == "stop"
    assert tried > 10


def test_stop_text_that_does_not_come(speaking: Engine) -> None:
    result = speaking.generate(PROMPTS[:2], 8, stop="never to be seen")
    assert [request.finish_reason for request in result.requests] == ["length", "length"]
    assert result.tokens == expected("llama", PROMPTS[:2], 8)


@pytest.mark.parametrize("stop", ["🙂", "🙂🙂🙂🙂🙂", "a🙂b"])
def test_stop_text_of_characters_of_several_tokens(stop: str) -> None:
    tokenizer = ByteTokenizer()
    intake = Intake(ModelConfig.from_hf(tiny("llama").config), tokenizer, 4096)
    request = intake.request([1], None, None, {"max_new_tokens": 100, "stop": stop})
    ids = tokenizer.byte_ids("some text before " + stop)
    for number in range(1, len(ids)):
        request.output = ids[:number]
        assert intake.ends(request) is None
    request.output = ids
    assert intake.ends(request) == "stop"


# -- cancellation


@pytest.mark.parametrize("mode", MODES)
def test_cancel_from_inside_on_token(engine: Engine, mode: str) -> None:
    engine.set_mode(mode)
    wanted = expected("llama", PROMPTS, NEW)

    def listen(request: Request, token: int) -> None:
        if request.prompt == PROMPTS[1] and len(request.output) == 7:
            engine.cancel(request)

    result = engine.generate(PROMPTS, NEW, on_token=listen)
    assert result.tokens == [wanted[0], wanted[1][:7], wanted[2], wanted[3]]
    assert [request.finish_reason for request in result.requests] == ["length", "cancelled", "length", "length"]
    assert result.metrics.cancelled == 1 and result.metrics.completed == 3


@pytest.mark.parametrize("mode", MODES)
def test_cancel_another_request_from_inside_on_token(engine: Engine, mode: str) -> None:
    engine.set_mode(mode)
    wanted = expected("llama", PROMPTS, NEW)
    victim = engine.submit(PROMPTS[1], max_new_tokens=NEW)

    def listen(request: Request, token: int) -> None:
        if len(request.output) == 9:
            engine.cancel(victim)

    result = engine.generate([PROMPTS[0], PROMPTS[2]], NEW, on_token=listen)
    assert result.tokens == [wanted[0], wanted[2]]
    assert victim.finish_reason == "cancelled"
    assert 5 <= len(victim.output) < NEW
    assert victim.output == wanted[1][: len(victim.output)]


@pytest.mark.parametrize("mode", MODES)
def test_cancel_from_another_thread(engine: Engine, mode: str) -> None:
    engine.set_mode(mode)
    new = CONTEXT - max(map(len, PROMPTS))
    wanted = expected("llama", PROMPTS, new)
    begun, requests = threading.Event(), []

    def listen(request: Request, token: int) -> None:
        if request.prompt == PROMPTS[2] and len(request.output) == 5:
            requests.append(request)
            begun.set()

    def cancel() -> None:
        assert begun.wait(20)
        engine.cancel(requests[0])

    thread = threading.Thread(target=cancel)
    thread.start()
    result = engine.generate(PROMPTS, new, on_token=listen)
    thread.join()
    cancelled = result.requests[2]
    assert cancelled.finish_reason == "cancelled"
    assert 5 <= len(cancelled.output) < new
    assert cancelled.output == wanted[2][: len(cancelled.output)]
    assert result.tokens[:2] + result.tokens[3:] == wanted[:2] + wanted[3:]


def test_cancel_what_waits_and_what_is_done(engine: Engine) -> None:
    engine.set_mode("sequential", max_batch=1)
    first, second, third = (engine.submit(prompt, max_new_tokens=6) for prompt in PROMPTS[:3])
    engine.cancel(second)
    engine.run()
    engine.cancel(first)
    assert (second.finish_reason, second.output, second.scheduled) == ("cancelled", [], None)
    assert [first.finish_reason, third.finish_reason] == ["length", "length"]
    assert [first.output, third.output] == expected("llama", [PROMPTS[0], PROMPTS[2]], 6)


# -- listeners


@pytest.mark.parametrize("mode", MODES)
def test_a_listener_that_fails_costs_its_request_only(engine: Engine, mode: str) -> None:
    engine.set_mode(mode)
    wanted = expected("llama", PROMPTS, NEW)

    def listen(request: Request, token: int) -> None:
        if request.prompt == PROMPTS[3] and len(request.output) == 4:
            raise ZeroDivisionError("the listener's own fault")

    with pytest.raises(GenerationError, match=r"1 of 4 requests failed.*the listener's own fault") as caught:
        engine.generate(PROMPTS, NEW, on_token=listen)
    result = caught.value.result
    assert result.tokens == [*wanted[:3], wanted[3][:4]]
    assert [request.finish_reason for request in result.requests] == ["length", "length", "length", "error"]
    assert isinstance(result.errors[0], ZeroDivisionError)
    assert result.timeline.requests[3].error == "the listener's own fault"


def test_listeners_hear_every_token_once_and_in_order(engine: Engine) -> None:
    heard: dict[int, list[int]] = {}
    result = engine.generate(
        PROMPTS, NEW, on_token=lambda request, token: heard.setdefault(request.id, []).append(token)
    )
    assert [heard[request.id] for request in result.requests] == result.tokens


def test_the_last_token_comes_with_the_request_done(engine: Engine) -> None:
    seen: list[bool] = []
    engine.generate(PROMPTS[0], 3, on_token=lambda request, token: seen.append(request.done))
    assert seen == [False, False, True]


# -- numbers that are none


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_end_their_request_with_an_error(
    make_engine: MakeEngine, mode: str, temperature: float
) -> None:
    """As where half precision overflows, or a device computes wrongly. The others' tokens stay what they are."""
    engine = make_engine("llama", mode)
    poisoned = [[*prompt[:-1], POISON] if number == 1 else prompt for number, prompt in enumerate(PROMPTS)]
    right = engine.generate(PROMPTS, NEW, temperature=temperature, seed=3)
    engine._transformer.weights["embed.weight"][POISON] = float("nan")
    with pytest.raises(GenerationError, match=r"output token 1 of a request hold a NaN.*float32") as caught:
        engine.generate(poisoned, NEW, temperature=temperature, seed=3)
    for number, (request, expected_tokens) in enumerate(zip(caught.value.result.requests, right.tokens, strict=True)):
        assert request.output == ([] if number == 1 else expected_tokens)
    assert engine.kv_use == 0
    assert engine.generate(PROMPTS[:1], NEW, temperature=temperature, seed=3).tokens == right.tokens[:1]
