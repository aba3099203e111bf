"""Where the models of the Hugging Face pipeline come from: a name, a folder, or an object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splitwiser_lab.errors import HardwareError, ModelError
from splitwiser_lab.hardware import choose_dtype
from splitwiser_lab.model.fetch import find_model
from splitwiser_lab.model.loading import load_tokenizer
from splitwiser_lab.model.shapes import SHAPES, random_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_LIMIT = 1 << 30  # tokens, for models without a table of positions


@dataclass(frozen=True)
class SourceModel:
    """A transformers model, its tokenizer if it came with one, and what it is called."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    random_weights: bool = False  # of the right shape, but never trained: good for times, not for texts


@dataclass(frozen=True)
class Facts:
    """What must be known of a model to check a request."""

    vocab_size: int
    context: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Facts:
        """Read a model's configuration; end-of-sequence ids as `generate` takes them."""
        config = model.config.get_text_config(decoder=True)
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = config.eos_token_id if eos is None else eos
        ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        return cls(config.vocab_size, getattr(config, "max_position_embeddings", None) or _NO_LIMIT, ids)


def load_source(model: Any, device: str, dtype: str | torch.dtype) -> SourceModel:
    """Load an alias, local folder or Hub id with AutoModelForCausalLM, make a shape, or take a model as it is.

    Raises ModelError for what is not such a model, HardwareError where an object has another dtype.
    """
    if isinstance(model, str) and model in SHAPES:
        kind = getattr(torch, choose_dtype(device, dtype).value)
        return SourceModel(model, random_model(model, device, kind), random_weights=True)
    if isinstance(model, str | Path):
        return _from_folder(str(model), device, dtype)
    if not (hasattr(model, "generate") and hasattr(model, "config")):
        raise ModelError(f"cannot use a {type(model).__name__}: give an alias, a folder, a Hub id, or a loaded model.")
    own = str(model.dtype).removeprefix("torch.")
    if str(dtype).removeprefix("torch.") not in ("auto", own):
        raise HardwareError(f"the model given is in {own}, not {dtype}: convert it with model.to(...), or say 'auto'.")
    return SourceModel(getattr(model.config, "_name_or_path", "") or type(model).__name__, model)


def _from_folder(name: str, device: str, dtype: str | torch.dtype) -> SourceModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, _ = find_model(name)
    kind = getattr(torch, choose_dtype(device, dtype).value)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.is_encoder_decoder:
            raise ModelError(
                f"{name!r} is an encoder-decoder ({config.model_type}): this pipeline splits decoders only."
            )
        loaded = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=kind, local_files_only=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{name!r} is not a model that AutoModelForCausalLM can load: {error}") from error
    return SourceModel(name, _on(loaded, device), load_tokenizer(folder))


def _on(model: Any, device: str) -> PreTrainedModel:
    return model.to(device).eval()  # type: ignore[no-any-return]
