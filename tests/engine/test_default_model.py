"""The real default model, where it is in the cache: its tokens, its text, its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import huggingface_hub
import pytest
from tiny_models import generated
from transformers import PreTrainedModel

from splitwiser_lab import Engine
from splitwiser_lab.model.fetch import ALIASES, cache_dir

NAME = "smollm2-135m"
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Prefill reads the whole prompt at once; decode writes one token at a time. " * 6,
]
pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(180),
]


def is_here() -> bool:
    """Whether the model can be loaded without a network: a test should not fetch 100 MB on the side."""
    if (cache_dir() / "models" / NAME / "complete").is_file():
        return True
    return isinstance(huggingface_hub.try_to_load_from_cache(ALIASES[NAME].hub_id, "model.safetensors"), str)


@pytest.fixture(scope="module")
def default_engine() -> Iterator[Engine]:
    if not is_here():
        pytest.skip(f"{NAME} is neither in {cache_dir()} nor in the Hub's cache: run `make demo` first")
    with Engine.from_pretrained(kv_tokens=4096) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(default_engine: Engine) -> PreTrainedModel:
    return default_engine.model.reference()


def test_greedy_tokens_are_those_of_transformers_in_every_mode(
    default_engine: Engine, reference: PreTrainedModel
) -> None:
    ids = [default_engine.tokenize(prompt) for prompt in PROMPTS]
    wanted = [generated(reference, prompt, 24, pad_token_id=0) for prompt in ids]
    for mode, options in (("sequential", {}), ("chunked", {"chunk_tokens": 24}), ("processes", {})):
        default_engine.set_mode(mode, **options)
        assert default_engine.generate(PROMPTS, 24).tokens == wanted


def test_it_makes_sense(default_engine: Engine) -> None:
    default_engine.set_mode("sequential")
    assert "Paris" in default_engine.generate(PROMPTS[0], 8).texts[0]
    question = default_engine.tokenize("What is the capital of Italy? Answer in one word.", chat=True)
    result = default_engine.generate(question, 32)
    assert "Rome" in result.texts[0]
    assert result.requests[0].finish_reason == "stop", "a chat model ends its turn"
    assert result.tokens[0][-1] in default_engine.config.eos_token_ids
    assert "<|im_end|>" not in result.texts[0]


def test_stream_and_stop_text(default_engine: Engine) -> None:
    text = default_engine.generate(PROMPTS[1], 40).texts[0]
    assert "".join(default_engine.stream(PROMPTS[1], max_new_tokens=40)) == text
    stop = "return"
    assert stop in text
    assert "".join(default_engine.stream(PROMPTS[1], max_new_tokens=40, stop=stop)) == text[: text.index(stop)]
    assert default_engine.generate(PROMPTS[1], 40, stop=stop).texts[0] == text[: text.index(stop)]


def test_empty_text(default_engine: Engine) -> None:
    from splitwiser_lab import RequestError

    with pytest.raises(RequestError, match="empty"):
        default_engine.generate("")


def test_it_says_where_it_came_from(default_engine: Engine) -> None:
    assert default_engine.model.name == NAME
    assert default_engine.model.origin.startswith(("package", "Hub"))
