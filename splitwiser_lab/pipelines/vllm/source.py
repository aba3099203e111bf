"""What the vLLM pipeline must know of a model: its folder, what a request may ask, and what its bytes are."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splitwiser_lab.errors import ModelError
from splitwiser_lab.hardware import choose_dtype
from splitwiser_lab.model.fetch import find_model
from splitwiser_lab.model.loading import load_tokenizer
from splitwiser_lab.model.shapes import SHAPES, shape_config
from splitwiser_lab.pipelines.multiplied import product_shapes
from splitwiser_lab.pipelines.source import Facts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_NO_LIMIT = 1 << 30  # tokens, for models without a table of positions


@dataclass(frozen=True)
class VllmModel:
    """A folder that vLLM can load; one with random weights holds a config.json and nothing else."""

    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase | None
    facts: Facts
    dtype: str
    random_weights: bool
    weight_bytes: int  # of one copy
    kv_token_bytes: int  # keys and values of one token, all layers
    scratch: tempfile.TemporaryDirectory[str] | None = None  # goes with the last who holds this
    products: tuple[tuple[int, int], ...] = ()  # shapes [out, in] of the weights that it multiplies with


def load_vllm_model(model: str | Path, device: str, dtype: str) -> VllmModel:
    """Find an alias, a local folder, a Hub id, or a shape (random weights). Loads no weights. Raises ModelError."""
    from transformers import AutoConfig

    if not isinstance(model, str | Path):
        raise ModelError(
            f"vLLM loads models from folders, not a {type(model).__name__}: save it with save_pretrained and give "
            "the folder, or give an alias, a Hub id or a shape."
        )
    name, kind = str(model), choose_dtype(device, dtype).value
    if name in SHAPES:
        scratch = tempfile.TemporaryDirectory(prefix="splitwiser-shape-")
        folder, config = Path(scratch.name, name), shape_config(name)
        config.save_pretrained(folder)
        return _described(name, folder, config, (), kind, None, scratch)
    folder, _ = find_model(name)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name!r} has no configuration that transformers knows: {error}") from error
    if config.is_encoder_decoder:
        raise ModelError(f"{name!r} is an encoder-decoder ({config.model_type}): this pipeline splits decoders only.")
    return _described(name, folder, config, _end_ids(folder, config), kind, load_tokenizer(folder), None)


def _described(
    name: str,
    folder: Path,
    config: PreTrainedConfig,
    ends: tuple[int, ...],
    dtype: str,
    tokenizer: PreTrainedTokenizerBase | None,
    scratch: tempfile.TemporaryDirectory[str] | None,
) -> VllmModel:
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    with torch.device("meta"):  # shapes alone
        empty = AutoModelForCausalLM.from_config(config, dtype=kind)
    weights = sum(parameter.numel() for parameter in empty.parameters()) * kind.itemsize
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * dim * kind.itemsize
    facts = Facts(text.vocab_size, getattr(text, "max_position_embeddings", None) or _NO_LIMIT, ends)
    random, shapes = scratch is not None, product_shapes(empty)
    return VllmModel(name, folder, tokenizer, facts, dtype, random, weights, token, scratch, shapes)


def _end_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """End-of-sequence ids as `generate` takes them: from the generation configuration where it names any."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:
        eos = None
    eos = config.get_text_config(decoder=True).eos_token_id if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
