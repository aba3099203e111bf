"""Which set of kernels runs on a device, found by trying: the fast one has to compute what the plain one does.

Considered for decode and not taken: `varlen_attn` with block tables (not before torch 2.12), and
FlexAttention over pages (its kernels do not split the contexts: 1.3 of 4.3 TB/s on an H200 where
ours read 2.8).
"""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch

from splitwiser_lab.hardware import Choice
from splitwiser_lab.model.attention import AttentionInput
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence
from splitwiser_lab.model.kernels import PlainKernels
from splitwiser_lab.model.paged import PagedInput, pack

_PAGE_SIZE = 16
_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of the norm of the result


@functools.cache
def choose_kernels(device: str, dtype: str) -> Choice:
    """`triton` where this package's kernels run on `device` in `dtype` and are right, else `plain`, and why."""
    if torch.device(device).type == "cpu":
        return Choice("plain", "PyTorch's own operations: the fast kernels are for GPUs")
    if importlib.util.find_spec("triton") is None:
        return Choice("plain", "Triton is not installed, which the fast kernels are written in")
    capability = torch.cuda.get_device_capability(device)
    try:
        error = kernel_error(device, dtype, capability)
    except Exception as failure:  # a compiler may fail in any way
        return Choice(
            "plain", f"Triton's kernels do not run on this GPU: {(str(failure) or repr(failure)).splitlines()[0][:200]}"
        )
    if not error < _TOLERANCE[dtype]:
        return Choice("plain", f"Triton's kernels are off by {error:.1e} of the result on this GPU")
    how = "split-KV decode in CUDA graphs, attention over pages in place"
    if not has_matrix_units(capability, getattr(torch, dtype)):
        why = "in float32" if dtype == "float32" else "before sm_80"
        how = f"split-KV decode in CUDA graphs; prefill by PyTorch's attention, as Triton has no matrix units {why}"
    return Choice("triton", how)


def kernel_error(device: str, dtype: str, capability: tuple[int, int]) -> float:
    """How far the fast attention is from the plain one, relative, on a small ragged batch with long contexts."""
    from splitwiser_lab.model.triton_kernels import TritonKernels

    heads, kv_heads, dim, kind = 8, 2, 64, getattr(torch, dtype)
    inv_freq = tuple(1e4 ** (-2 * i / dim) for i in range(dim // 2))
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "norm_eps": 1e-5}
    config: Any = SimpleNamespace(**shape, inv_freq=inv_freq, rope_scale=1.0)
    lengths = [(0, 1), (1, 1), (600, 1), (0, 150), (130, 40)]  # where it starts, and tokens
    order = torch.randperm(200).tolist()
    sequences = []
    for start, count in lengths:
        table = [order.pop() for _ in range(-(-(start + count) // _PAGE_SIZE))]
        sequences.append(Sequence([0] * count, start, table, GREEDY))
    batch = Batch(sequences[:3], sequences[3:])
    pool = torch.randn(2, 200, _PAGE_SIZE, kv_heads, dim, device=device).to(kind)
    qk = torch.randn(sum(count for _, count in lengths), heads + kv_heads, dim, device=device).to(kind)
    v = torch.randn(len(qk), kv_heads, dim, device=device).to(kind)
    plain = PlainKernels(config, device, torch.float32)
    packed = pack(batch, _PAGE_SIZE, parts=8, no_place=200)
    where = PagedInput.views(torch.from_numpy(packed.numbers).to(device), packed)
    theirs = plain.attend(
        qk.float(),
        v.float(),
        plain.rotation(where.positions),
        tuple(pool.float()),
        AttentionInput.of(batch, _PAGE_SIZE, device, torch.float32),
    )
    fast = TritonKernels(config, device, kind, _PAGE_SIZE, capability)
    ours = fast.attend(qk, v, fast.rotation(where.positions), tuple(pool), where).float()
    return float((ours - theirs).norm() / theirs.norm())


def has_matrix_units(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether Triton multiplies matrices of `dtype` in hardware: in half precision from sm_80 on."""
    return dtype != torch.float32 and capability >= (8, 0)
