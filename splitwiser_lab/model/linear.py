"""x @ weight.T + bias, by the fastest of PyTorch's own kernels for the number of rows.

On a GPU, and in half precision, `F.linear` is the right call. In float32 on an x86 CPU it is not:
its matrix library re-packs the weights at every call, which for the few rows of a decode step costs
more than the product. Two other kernels that come with PyTorch read the plain weights as they are.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from splitwiser_lab.hardware import Choice

_FEW_ROWS = 4


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [rows, in], `weight` [out, in] -> [rows, out]."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or cpu_kernel().value != "onednn":
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    if rows > _FEW_ROWS:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    # One row would go to a matrix-vector kernel that uses a single core: give it a second, empty one.
    columns = F.pad(x, (0, 0, 0, 1)) if rows == 1 else x
    out = (weight @ columns.t()).t()[:rows]
    return out if bias is None else out + bias


@functools.cache
def cpu_kernel() -> Choice:
    """`onednn` where this PyTorch has its linear kernel and it computes what `F.linear` does, else `default`."""
    if not torch.backends.mkldnn.is_available():
        return Choice("default", "this PyTorch has no oneDNN")
    x, weight = torch.rand(8, 64), torch.rand(32, 64)
    try:
        out = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError) as error:
        return Choice("default", f"oneDNN's linear kernel cannot be called in PyTorch {torch.__version__}: {error}")
    if not torch.allclose(out, F.linear(x, weight), rtol=1e-5, atol=1e-5):
        return Choice("default", "oneDNN's linear kernel computed something else than F.linear")
    return Choice("onednn", "float32 products of few rows without re-packing the weights")
