"""Models of a known shape with random weights, for measuring where the real ones are not to be had.

Times depend on the shape alone, so they are those of the real model; texts mean nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
_NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Sizes as the makers' config.json files give them.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b-shape": (
        "Llama",
        {
            **_LLAMA3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
        },
    ),
    "llama-3.1-8b-shape": (
        "Llama",
        {
            **_LLAMA3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "head_dim": 128,
            "tie_word_embeddings": False,
            "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
        },
    ),
    "opt-125m-shape": (
        "OPT",
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "word_embed_proj_dim": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
}


def shape_config(name: str) -> PreTrainedConfig:
    """The transformers configuration of a shape; it has no end-of-sequence token."""
    import transformers

    kind, sizes = SHAPES[name]
    config: PreTrainedConfig = getattr(transformers, f"{kind}Config")(**{**sizes, **_NO_TOKENS})
    return config


def random_model(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A transformers model of this shape, made on `device` (so a large one takes seconds), in eval mode.

    The same weights each time on the same kind of device.
    """
    from transformers import AutoModelForCausalLM

    where = torch.device(device)
    with torch.random.fork_rng([where] if where.type == "cuda" else []), where:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape_config(name), dtype=dtype).eval()
    return model
