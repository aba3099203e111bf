"""Whether a device multiplies matrices right, asked where it has only some of its SMs.

One would take it for granted. On an H200 (driver 580, CUDA 13.0, PyTorch 2.11) a client of MPS that has 75 % of the
SMs gets NaN and numbers of the wrong size from most of cuBLAS's bfloat16 and float16 products; with 25, 50 or 100 %,
and in float32, it gets the right ones. The tokens that follow look like tokens. So whoever computes on a part of a GPU
asks first, which takes some tenths of a second.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from splitwiser_lab.errors import HardwareError
from splitwiser_lab.model.linear import linear

ROWS = (1, 8, 32, 100, 256, 512, 1024, 2048, 4096)
_MOST_ELEMENTS = 1 << 27  # of one product: more rows are never asked of a matrix so wide
_COLUMNS = 2048  # that are compared at once, which bounds the memory in float32
# Rounding to bfloat16 costs about 0.02 of what is compared with, sums in it some times that; what was wrong, 4 to 7.
_TOLERANCE = 0.2
_NAMED = 3


def check_products(matrices: Iterable[torch.Tensor], where: str, advice: str, rows: Iterable[int] = ROWS) -> None:
    """Raise HardwareError when products with these weights [out, in] come out wrong `where`; `advice` says what to do.

    One matrix of each shape is tried, with each number of rows.
    """
    distinct = list({matrix.shape: matrix for matrix in matrices}.values())
    tried = [(matrix, count) for matrix in distinct for count in rows if count * len(matrix) <= _MOST_ELEMENTS]
    wrong = [
        f"[{count}, {matrix.shape[1]}] x {list(matrix.T.shape)}" for matrix, count in tried if _wrong(matrix, count)
    ]
    if wrong:
        kind = str(distinct[0].dtype).removeprefix("torch.")
        raise HardwareError(
            f"{where}, {len(wrong)} of {len(tried)} {kind} products come out wrong (e.g. {', '.join(wrong[:_NAMED])}): "
            f"the device's matrix library fails there, and every token would be wrong. {advice}"
        )


def _wrong(matrix: torch.Tensor, rows: int) -> bool:
    """Whether a product of normal random numbers [rows, in] differs from float32's by more than rounding does."""
    generator = torch.Generator(matrix.device).manual_seed(rows)
    x = torch.randn((rows, matrix.shape[1]), generator=generator, device=matrix.device).to(matrix.dtype)
    product, exact = linear(x, matrix), x.float()
    for columns, weights in zip(product.split(_COLUMNS, 1), matrix.split(_COLUMNS), strict=True):
        weights = weights.float()
        scale = weights.norm(dim=1)  # of a column, since the numbers of x have variance 1
        if not bool(((columns.float() - exact @ weights.T).abs() <= _TOLERANCE * scale).all()):  # NaN is not
            return True
    return False
