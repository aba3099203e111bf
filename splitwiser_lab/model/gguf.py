"""From a Llama-family GGUF file to a folder with config, tokenizer and float32 safetensors.

Done once; the folder then loads in under a second with the usual tools.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING

from splitwiser_lab.errors import ModelError

if TYPE_CHECKING:
    import torch

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Path, folder: Path) -> None:
    """Write `folder` from `gguf`. Raises ModelError when the file is broken or not of the Llama family."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from rich.console import Console
    from rich.progress import track
    from transformers import AutoConfig, AutoTokenizer

    try:
        reader = GGUFReader(gguf)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if config.model_type != "llama":
            raise ModelError(f"GGUF of family {config.model_type!r}: only Llama-shaped files are converted.")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        import torch

        tensors: dict[str, torch.Tensor] = {}
        console = Console(stderr=True)
        for item in track(reader.tensors, "converting to safetensors (once)", console=console, transient=True):
            name = _hf_name(item.name)
            tensor = torch.from_numpy(dequantize(item.data, item.tensor_type).copy())
            for projection, count in heads.items():
                if name.endswith(f"{projection}.weight"):
                    tensor = _split_halves(tensor, count)
            tensors[name] = tensor.contiguous()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, KeyError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{gguf.name} cannot be read as GGUF ({error}): download it again.") from error
    config.tie_word_embeddings = "lm_head.weight" not in tensors
    config.dtype = "float32"
    folder.mkdir(parents=True)
    save(tensors, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError, with errno ENOSPC when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it tells a full disk by its text alone
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block:
        return f"model.layers.{block[1]}.{_NAMES[block[2]]}.weight"
    return f"{_NAMES[name.removesuffix('.weight')]}.weight"


def _split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF keeps rotated pairs side by side; transformers keeps them half a head apart. `weight` [heads * D, in]."""
    rows = weight.view(heads, -1, 2, weight.shape[-1])  # [heads, D / 2, 2, in]
    return rows.transpose(1, 2).reshape(weight.shape)
