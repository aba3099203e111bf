"""What a transformers model multiplies with, to check that a device does it right: see `model/products.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # which vLLM multiplies with at once


def multiplied(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """All 2-D weights as [out, in]: of each nn.Linear, and of each Conv1D (GPT-2's), which keeps [in, out]."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            yield module.weight
        elif isinstance(module, Conv1D):
            yield module.weight.T


def product_shapes(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """The shapes [out, in] of these weights, and of those that vLLM puts side by side. The model may lie on `meta`."""
    shapes = {(int(weight.shape[0]), int(weight.shape[1])) for weight in multiplied(model)}
    for module in model.modules():
        for names in _FUSED:
            parts = [part for name in names if isinstance(part := getattr(module, name, None), torch.nn.Linear)]
            if len(parts) == len(names):
                shapes.add((sum(part.out_features for part in parts), parts[0].in_features))
    return tuple(sorted(shapes))
