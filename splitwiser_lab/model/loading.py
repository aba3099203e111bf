"""From a name, a folder or a loaded Hugging Face model to weights in shared memory and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splitwiser_lab.errors import ModelError
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.fetch import find_model
from splitwiser_lab.model.shapes import SHAPES, random_model
from splitwiser_lab.model.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """Weights on a device, the tokenizer if there is one, and where they came from."""

    name: str
    origin: str
    weights: Weights
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path | None
    random_weights: bool = False  # of the right shape, but never trained: good for times, not for texts

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.weights.config

    def reference(self) -> PreTrainedModel:
        """The same weights in transformers' own model, to compare tokens with (loaded anew, eval mode).

        Raises ModelError for a model that was given as an object: there the caller has the reference.
        """
        from transformers import AutoModelForCausalLM

        if self.random_weights:
            return random_model(self.name, self.weights.device, self.weights.dtype)
        if self.folder is None:
            raise ModelError("this model was given as an object: use that object as the reference.")
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.weights.dtype, local_files_only=True)
        return model.to(self.weights.device).eval()  # type: ignore[no-any-return, arg-type]


def load(model: str | Path | Any, device: str, dtype: torch.dtype) -> LoadedModel:
    """Load an alias, local folder, Hub id, the name of a shape (random weights), or a loaded Hugging Face model.

    Raises ModelError when it cannot be found, read, or is of a family this engine does not run.
    """
    if isinstance(model, str) and model in SHAPES:
        return _load_shape(model, device, dtype)
    if isinstance(model, str | Path):
        folder, origin = find_model(str(model))
        return _load_folder(str(model), folder, origin, device, dtype)
    if not hasattr(model, "state_dict") or not hasattr(model, "config"):
        raise ModelError(
            f"cannot load a {type(model).__name__}: give an alias, a folder, a Hub id, or a transformers model."
        )
    config = _with_generation_eos(ModelConfig.from_hf(model.config), getattr(model, "generation_config", None))
    config = _with_its_frequencies(config, model)
    state = model.state_dict()
    weights = Weights(config, dtype, device).fill(_reader(state.__getitem__))
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return LoadedModel(name, "a transformers model in memory", weights, None, None)


def _load_shape(name: str, device: str, dtype: torch.dtype) -> LoadedModel:
    loaded = load(random_model(name, device, dtype), device, dtype)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # of the model that was copied, so that the KV pool finds its memory free
    return replace(loaded, name=name, origin="random weights of this shape", random_weights=True)


def _load_folder(name: str, folder: Path, origin: str, device: str, dtype: torch.dtype) -> LoadedModel:
    from transformers import AutoConfig, GenerationConfig

    try:
        config = ModelConfig.from_hf(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"config.json of {name!r} cannot be read: {error}") from error
    if (folder / "generation_config.json").is_file():
        config = _with_generation_eos(config, GenerationConfig.from_pretrained(folder, local_files_only=True))
    with ExitStack() as files:
        weights = Weights(config, dtype, device).fill(_reader(_open_safetensors(folder, files)))
    return LoadedModel(name, origin, weights, load_tokenizer(folder), folder)


def _open_safetensors(folder: Path, files: ExitStack) -> Callable[[str], torch.Tensor]:
    """A function that reads one tensor by name from the folder's safetensors files."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    paths = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise ModelError(f"{index.name} is broken ({error!r}): download {folder.name} again.") from error
        paths = [folder / file for file in listed]
    if not paths:
        others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        why = f"it holds {', '.join(others)}, which are pickles and may run code" if others else "it holds no weights"
        raise ModelError(f"{folder.name} has no safetensors file: {why}. Convert it with save_pretrained().")
    where: dict[str, Any] = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"weights file {path.name} is missing, broken or truncated ({error}): delete {path.parent} "
                "and load the model again."
            ) from error
        where.update(dict.fromkeys(file.keys(), file))
    return lambda key: where[key].get_tensor(key)


def _reader(read: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """`read`, which also finds tensors of checkpoints that leave out the leading `model.`."""

    def get(key: str) -> torch.Tensor:
        try:
            return read(key)
        except KeyError:
            return read(key.removeprefix("model."))

    return get


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder; None where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _with_its_frequencies(config: ModelConfig, model: Any) -> ModelConfig:
    """Rotary frequencies as the model has them: `model.to(torch.bfloat16)` rounds those, too, unlike `dtype=`."""
    found = [tensor for name, tensor in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    if len(found) != 1 or found[0].numel() != len(config.inv_freq):
        return config
    return replace(config, inv_freq=tuple(found[0].float().tolist()))


def _with_generation_eos(config: ModelConfig, generation: Any) -> ModelConfig:
    """End-of-sequence ids as `generate` takes them: from the generation config where it names any."""
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        return config
    return replace(config, eos_token_ids=tuple(ids) if isinstance(ids, list) else (ids,))
