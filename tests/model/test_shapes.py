"""Shapes: random weights of the right sizes, the same in the engine and in the reference."""

from __future__ import annotations

import pytest
import torch
from tiny_models import generated, prompts_of

from splitwiser_lab import Engine
from splitwiser_lab.model import shapes
from splitwiser_lab.model.config import ModelConfig

_TINY = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}


def test_the_engine_and_its_reference_have_the_same_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny-shape", ("Llama", _TINY))
    state = torch.get_rng_state()
    with Engine.from_pretrained("tiny-shape", device="cpu", kv_tokens=512, page_size=8) as engine:
        assert engine.model.random_weights and engine.model.name == "tiny-shape" and engine.config.eos_token_ids == ()
        [prompt] = prompts_of(20)
        assert engine.generate([prompt], 8).tokens == [generated(engine.model.reference(), prompt, 8)]
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers were touched"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.2-1b-shape", 1.236e9), ("llama-3.1-8b-shape", 8.030e9), ("opt-125m-shape", 0.125e9)],
)
def test_a_shape_has_the_size_of_its_name(name: str, parameters: float) -> None:
    layout = ModelConfig.from_hf(shapes.shape_config(name)).layout()
    total = sum(torch.Size(shape).numel() for shape, _ in layout.values())
    assert total == pytest.approx(parameters, rel=0.01)
