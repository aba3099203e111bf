"""Whether a device multiplies matrices right, asked where it has only some of its SMs.

One would take it for granted. On an H200 (driver 580, CUDA 13.0, PyTorch 2.11) a client of MPS that has 75 % of the
SMs gets NaN and numbers of the wrong size from most of cuBLAS's bfloat16 and float16 products; with 25, 50 or 100 %,
and in float32, it gets the right ones. The tokens that follow look like tokens. So whoever computes on a part of a GPU
asks first, which takes some tenths of a second; `splitwiser-lab doctor --mps-shares all` asks for each share.

vLLM's Python loads this file by its path, without the package: it imports PyTorch, and the rest only where it raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.nn.functional import linear

ANOTHER_PART = "Choose another share (of an H200, 25, 50, 90 and 100 % were seen to be right), or float32."
ROWS = (1, 8, 16, 32, 64, 100, 128, 192, 256, 384, 512, 640, 1024, 1536, 2048, 3072, 4096)
_MOST_ELEMENTS = 1 << 27  # of one product: more rows are never asked of a matrix so wide
_COLUMNS = 2048  # that are compared at once, which bounds the memory in float32
# Rounding to bfloat16 costs about 0.02 of what is compared with, sums in it some times that; what was wrong, 4 to 7.
_TOLERANCE = 0.2
_NAMED = 3


def check_products(matrices: Iterable[torch.Tensor], where: str, advice: str, rows: Iterable[int] = ROWS) -> None:
    """Raise HardwareError when products with these weights [out, in] come out wrong `where`; `advice`: what to do."""
    from splitwiser_lab.errors import HardwareError

    distinct = _distinct(matrices)
    tried, wrong = wrong_products(distinct, rows)
    if wrong:
        raise HardwareError(complaint(str(distinct[0].dtype).removeprefix("torch."), tried, wrong, where, advice))


def complaint(dtype: str, tried: Sequence[str], wrong: Sequence[str], where: str, advice: str) -> str:
    """What to say of products that came out wrong, some of which are named."""
    return (
        f"{where}, {len(wrong)} of {len(tried)} {dtype} products come out wrong (e.g. {', '.join(wrong[:_NAMED])}): "
        f"the device's matrix library fails there, and every token would be wrong. {advice}"
    )


def wrong_products(matrices: Iterable[torch.Tensor], rows: Iterable[int] = ROWS) -> tuple[list[str], list[str]]:
    """Which products were tried with these weights [out, in], and which of them came out wrong.

    They are called `[rows, in] x [in, out]`. One matrix of each shape is tried, with each number of rows.
    """
    rows = tuple(rows)
    tried = [(m, count) for m in _distinct(matrices) for count in rows if count * len(m) <= _MOST_ELEMENTS]
    names = [f"[{count}, {matrix.shape[1]}] x {list(matrix.T.shape)}" for matrix, count in tried]
    return names, [name for name, (matrix, count) in zip(names, tried, strict=True) if _wrong(matrix, count)]


def random_matrices(shapes: Iterable[Sequence[int]], dtype: str, device: str) -> Iterator[torch.Tensor]:
    """One matrix [out, in] of normal random numbers for each of `shapes`."""
    for number, shape in enumerate(shapes):
        generator = torch.Generator(device).manual_seed(number)
        yield torch.randn(tuple(shape), generator=generator, dtype=getattr(torch, dtype), device=device)


def part_under_mps(share: int, device: str | torch.device) -> str:
    """`share` percent of the SMs of a GPU in words, for a message, with the SMs that this process sees."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return f"under MPS with {share} % of the GPU ({sms} SMs)"


def _distinct(matrices: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """One of each shape."""
    return list({matrix.shape: matrix for matrix in matrices}.values())


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
