"""A tiny model in a folder with shapes that vLLM's kernels take, and the fake that speaks as vLLM does."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_models import build
from transformers import PreTrainedModel

FAKE = Path(__file__).parent / "pipelines" / "fake_vllm.py"


def tiny_for_vllm(folder: Path) -> PreTrainedModel:
    """A small Llama, heads of 32, also saved in `folder`."""
    model = build("llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    model.save_pretrained(folder)
    return model


def fake_python(folder: Path) -> str:
    """A program that can be given for vLLM's Python."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n{FAKE.read_text()}")
    program.chmod(0o755)
    return str(program)
