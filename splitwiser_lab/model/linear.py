"""x @ weight.T + bias, by the fastest of PyTorch's own kernels for the device and the type.

On a GPU `F.linear` is the right call. In float32 on an x86 CPU it is not: its matrix library re-packs
the weights at every call, which for the few rows of a decode step costs more than the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from splitwiser_lab.model.packed import multiply, packing


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [rows, in], `weight` [out, in] -> [rows, out]. On a CPU `weight` may be packed."""
    if x.device.type == "cpu" and (weight.is_mkldnn or (x.dtype == torch.float32 and packing().value != "plain")):
        return multiply(x, weight, bias)
    return F.linear(x, weight, bias)
