"""Tiny models of the families that the pipeline is tested with, GPT-2 among them, which our engine does not run."""

from __future__ import annotations

import functools

import torch
import transformers
from tiny_models import CONTEXT, VOCAB, tiny
from transformers import PreTrainedModel

FAMILIES = ("opt", "gpt2", "llama", "qwen2")


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    """The shared tiny model of a family: do not change it."""
    if family != "gpt2":
        return tiny(family)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=48,
        n_layer=2,
        n_head=6,
        n_positions=CONTEXT,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).float().eval()
