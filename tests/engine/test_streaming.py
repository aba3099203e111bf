"""Streaming: the pieces are the text, as early as it is certain; leaving the loop cancels the request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import speaking_engine
from tiny_models import expected, prompts_of

from splitwiser_lab import Engine, RequestError
from splitwiser_lab.engine.result import settled

PROMPTS = prompts_of(40, 12, 25, 60, 33, 9)


@pytest.fixture(scope="module")
def speaking() -> Iterator[Engine]:
    with speaking_engine() as engine:
        yield engine


@pytest.mark.parametrize("mode", ["sequential", "chunked", "processes"])
def test_pieces_join_to_the_text(speaking: Engine, mode: str) -> None:
    speaking.set_mode(mode)
    broken = 0
    for prompt in PROMPTS:
        text = speaking.generate(prompt, 60).texts[0]
        pieces = list(speaking.stream(prompt, max_new_tokens=60))
        assert "".join(pieces) == text
        assert all(pieces) and len(pieces) > 20
        broken += text.count("\ufffd")
    assert broken > 20, "these texts should have many incomplete characters"


def test_pieces_join_to_the_text_before_a_stop_text(speaking: Engine) -> None:
    """Wherever it begins, nothing of the stop text may have been sent."""
    speaking.set_mode("sequential")
    text, tried = speaking.generate(PROMPTS[0], 40).texts[0], 0
    for at in range(len(text) - 5):
        stop = text[at : at + 5]
        if "\ufffd" not in stop:
            tried += 1
            pieces = speaking.stream(PROMPTS[0], max_new_tokens=40, stop=(stop, "never to be seen"))
            assert "".join(pieces) == text[: text.index(stop)]
    assert tried > 3


@pytest.mark.parametrize(
    ("text", "stop", "certain"),
    [
        ("prefill", (), "prefill"),
        ("prefill\ufffd", (), "prefill"),
        ("a\ufffdb\ufffd\ufffd", (), "a\ufffdb"),
        ("one EN", ("END",), "one "),
        ("one EN\ufffd", ("END",), "one "),
        ("one E", ("END", "E"), "one "),
        ("one ENE", ("END",), "one EN"),
        ("aaa", ("aab",), "a"),
        ("", ("x",), ""),
    ],
)
def test_what_is_certain(text: str, stop: tuple[str, ...], certain: str) -> None:
    assert settled(text, stop) == certain


def test_the_first_piece_comes_before_the_last_token(speaking: Engine) -> None:
    stream = speaking.stream(PROMPTS[0], max_new_tokens=200)
    next(stream)
    assert speaking.kv_use > 0, "the request is still under way"
    stream.close()


@pytest.mark.parametrize("mode", ["sequential", "chunked", "processes"])
def test_leaving_the_loop_cancels(speaking: Engine, mode: str) -> None:
    speaking.set_mode(mode)
    for number, _ in enumerate(speaking.stream(PROMPTS[0], max_new_tokens=200)):
        if number == 3:
            break
    assert speaking.kv_use == 0
    assert speaking.generate(PROMPTS, 8).tokens == expected("llama", PROMPTS, 8)


def test_two_streams_in_turns(speaking: Engine) -> None:
    speaking.set_mode("sequential")
    texts = speaking.generate(PROMPTS[:2], 30).texts
    streams = [speaking.stream(prompt, max_new_tokens=30) for prompt in PROMPTS[:2]]
    got = ["", ""]
    while streams_left := [i for i, stream in enumerate(streams) if stream is not None]:
        for i in streams_left:
            piece = next(streams[i], None)
            if piece is None:
                streams[i] = None
            else:
                got[i] += piece
    assert got == texts


def test_a_request_that_cannot_be_served_is_refused(speaking: Engine) -> None:
    with pytest.raises(RequestError, match="context"):
        next(speaking.stream(PROMPTS[0], max_new_tokens=1000))
    assert "".join(speaking.stream(PROMPTS[1], max_new_tokens=4)) == speaking.generate(PROMPTS[1], 4).texts[0]


def test_text_in_text_out(speaking: Engine) -> None:
    prompt = "What is prefill?"
    ids = speaking.tokenize(prompt)
    assert speaking.generate(prompt, 6).tokens == speaking.generate(ids, 6).tokens
    assert speaking.generate([prompt, prompt], 6).texts == [speaking.generate(ids, 6).texts[0]] * 2
