"""Keys and values of a transformers model, between its own cache and memory that processes share.

The only file that knows how transformers lays out a cache, which moves between its versions. It knows
layers of plain and of sliding-window attention; others are refused by name.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from splitwiser_lab.errors import ModelError
from splitwiser_lab.shared_memory import Buffer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class KVLayout:
    """What one token leaves in the cache: heads, and the size of a key and of a value, for each layer."""

    layers: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype

    def nbytes(self, rows: int, tokens: int) -> int:
        """Bytes of the keys and values of `rows` sequences of `tokens` tokens."""
        each = (rows * heads * tokens * dim * self.dtype.itemsize for heads, *dims in self.layers for dim in dims)
        return sum(_aligned(nbytes) for nbytes in each)


@dataclass(frozen=True)
class Stored:
    """What lies in a slot: tokens kept in each layer (a sliding window drops old ones), and tokens ever seen."""

    rows: int
    kept: tuple[int, ...]
    seen: int


def layout_of(model: PreTrainedModel) -> KVLayout:
    """Run `model` over one token and see what it keeps of it.

    Raises ModelError for a model that has no keys and values per token, or keeps more than those.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise _refused(name, "it is an encoder-decoder, whose decoder looks at an encoder's output too")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _refused(name, "its forward takes no past_key_values")
    cache = new_cache(model.config)
    if odd := sorted({type(layer).__name__ for layer in cache.layers} - set(_LAYERS)):
        raise _refused(
            name, f"its cache has layers of {', '.join(odd)}, which hold a state or more than keys and values"
        )
    with torch.inference_mode():
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=token, past_key_values=cache, use_cache=True)
    if not all(layer.is_initialized and layer.keys.shape[-2] == 1 for layer in cache.layers):
        raise _refused(name, "it left no key and value of a token in the cache it was given")
    if len({tensor.dtype for layer in cache.layers for tensor in (layer.keys, layer.values)}) != 1:
        raise _refused(name, "its layers keep keys and values in different dtypes")
    shapes = tuple((layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers)
    return KVLayout(shapes, cache.layers[0].keys.dtype)


def new_cache(config: PreTrainedConfig) -> Any:
    """An empty cache, as `generate` makes one for this configuration. Raises ModelError for an unknown version."""
    cache = transformers.DynamicCache(config=config)
    layers = getattr(cache, "layers", None)
    if not layers or not all(hasattr(layers[0], attribute) for attribute in ("keys", "values", "is_initialized")):
        raise ModelError(
            f"transformers {transformers.__version__} lays out its DynamicCache in a way that this pipeline does not "
            "know: install a version in the range that pyproject.toml names."
        )
    return cache


def store(cache: Any, buffer: Buffer, offset: int) -> Stored:
    """Copy all keys and values of `cache`, each [B, H, T, D], into `buffer` from byte `offset` on."""
    kept = []
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            buffer.tensor(tensor.dtype, tuple(tensor.shape), offset).copy_(tensor)
            offset += _aligned(tensor.numel() * tensor.element_size())
        kept.append(int(layer.keys.shape[-2]))
    return Stored(int(cache.layers[0].keys.shape[0]), tuple(kept), int(cache.get_seq_length()))


def view(stored: Stored, layout: KVLayout, config: PreTrainedConfig, buffer: Buffer, offset: int) -> Any:
    """A cache over what `store` left in `buffer`, without a copy.

    The first step that adds a token copies all of it elsewhere, as it does with any DynamicCache. After
    that step the memory may be written anew.
    """
    cache = new_cache(config)
    for layer, kept, (heads, *dims) in zip(cache.layers, stored.kept, layout.layers, strict=True):
        shapes = [(stored.rows, heads, kept, dim) for dim in dims]
        tensors = []
        for shape in shapes:
            tensors.append(buffer.tensor(layout.dtype, shape, offset))
            offset += _aligned(math.prod(shape) * layout.dtype.itemsize)
        layer.keys, layer.values = tensors
        layer.dtype, layer.device, layer.is_initialized = layout.dtype, tensors[0].device, True
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = stored.seen
    return cache


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _refused(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} cannot be split into prefill and decode here: {why}. "
        "Use a decoder-only model with attention and a KV cache, such as Llama, Qwen, Mistral, OPT or GPT-2."
    )
