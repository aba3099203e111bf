"""Tiny random models of every family, built by transformers, and what transformers generates with them.

Initialised widely, with random biases and norms, so that greedy tokens vary and no weight is without effect.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 199
CONTEXT = 256

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROPE_SHAPE = {**_SHAPE, "intermediate_size": 80, "num_key_value_heads": 2, "initializer_range": 0.3}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-scaled-tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_SCALING}),
    "llama-biased": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None, "num_hidden_layers": 3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
    "opt": ("OPT", {"tie_word_embeddings": True, "ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.4}),
    "opt-untied": ("OPT", {"tie_word_embeddings": False, "ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.4}),
}
VARIANTS = tuple(_BUILDERS)  # all of them, for what is cheap
FAMILIES = ("llama", "llama-scaled-tied", "mistral", "qwen2", "qwen3", "opt")  # for what is not


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A new random model in float32, ready to run; `changes` go into its configuration."""
    kind, settings = _BUILDERS[name]
    shape = _SHAPE if kind == "OPT" else _ROPE_SHAPE
    config = getattr(transformers, f"{kind}Config")(**{**shape, **settings, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if parameter_name.endswith("bias") else 1.0, 0.2)
    return model


@functools.cache
def tiny(name: str) -> PreTrainedModel:
    """The model of that name that all tests share: do not change it."""
    return build(name)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths in tokens."""
    numbers = random.Random(seed)
    return [[numbers.randrange(VOCAB) for _ in range(length)] for length in lengths]


def generated(model: PreTrainedModel, prompt: list[int], count: int, **options: Any) -> list[int]:
    """The new tokens of transformers' own greedy `generate` on one prompt."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


@functools.cache
def _expected(name: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(generated(tiny(name), list(prompt), count))


def expected(name: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What transformers generates greedily for each prompt with the shared model of that name."""
    tokens = [list(_expected(name, tuple(prompt), count)) for prompt in prompts]
    varied = sum(len(set(output)) for output in tokens)
    assert varied > 0.3 * sum(map(len, tokens)), f"{name} loops, which would hide mistakes: {tokens}"
    return tokens
