"""Which models are understood, and what is said of those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tiny_models import VARIANTS, build, tiny

from splitwiser_lab.errors import ModelError
from splitwiser_lab.model.config import FAMILIES, ModelConfig


def llama(**settings: Any) -> transformers.LlamaConfig:
    small = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.LlamaConfig(**{**small, **settings})


@pytest.mark.parametrize("name", VARIANTS)
def test_layout_names_every_weight_of_transformers_once(name: str) -> None:
    """None is forgotten, none is read twice, and the shapes add up."""
    model = tiny(name)
    config = ModelConfig.from_hf(model.config)
    state = model.state_dict()
    if config.tied:
        state.pop("lm_head.weight", None)
    read = [source for _, sources in config.layout().values() for source in sources]
    assert sorted(read) == sorted(state)
    for shape, sources in config.layout().values():
        assert shape[0] == sum(state[source].shape[0] for source in sources)
        assert all(tuple(state[source].shape[1:]) == shape[1:] for source in sources)


@pytest.mark.parametrize("kind", ["GPT2Config", "BloomConfig", "GemmaConfig", "MixtralConfig", "Phi3Config"])
def test_unknown_family_names_the_known_ones_and_the_pipeline(kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf(getattr(transformers, kind)())
    message = str(caught.value)
    assert getattr(transformers, kind).model_type in message
    assert all(family in message for family in FAMILIES)
    assert "Hugging Face pipeline" in message


@pytest.mark.parametrize(
    "odd",
    [
        {"do_layer_norm_before": False, "word_embed_proj_dim": 32},  # OPT-350m
        {"word_embed_proj_dim": 16},
        {"layer_norm_elementwise_affine": False, "word_embed_proj_dim": 32},  # Galactica
        {"_remove_final_layer_norm": True, "word_embed_proj_dim": 32},
        {"activation_function": "silu", "word_embed_proj_dim": 32},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_odd_opt_is_refused_with_what_is_odd(odd: dict[str, Any]) -> None:
    config = transformers.OPTConfig(hidden_size=32, num_attention_heads=4, ffn_dim=64, **odd)
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf(config)
    assert str(next(iter(odd.values()))) in str(caught.value)
    assert "Hugging Face pipeline" in str(caught.value)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_the_length_is_refused(kind: str) -> None:
    scaling: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    with pytest.raises(ModelError, match=kind):
        ModelConfig.from_hf(llama(rope_parameters=scaling))


def test_other_activation_is_refused() -> None:
    with pytest.raises(ModelError, match="gelu"):
        ModelConfig.from_hf(llama(hidden_act="gelu"))


def test_head_size_is_the_configured_one() -> None:
    qwen3 = ModelConfig.from_hf(tiny("qwen3").config)
    assert (qwen3.heads, qwen3.head_dim, qwen3.hidden) == (6, 16, 48)
    assert ModelConfig.from_hf(tiny("mistral").config).head_dim == 8


def test_sliding_window_bounds_the_context() -> None:
    """Inside the window sliding attention is plain attention, so that is how far this engine goes."""
    assert ModelConfig.from_hf(build("mistral", sliding_window=50).config).context == 50
    assert ModelConfig.from_hf(build("mistral", sliding_window=5000).config).context == 256
    assert ModelConfig.from_hf(tiny("mistral").config).context == 256


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_end_of_sequence_ids(given: Any, ids: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf(llama(eos_token_id=given)).eos_token_ids == ids


def test_kv_bytes_per_token() -> None:
    config = ModelConfig.from_hf(tiny("llama").config)
    assert config.kv_bytes_per_token(4) == 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head dim, bytes
