"""NVTX ranges, which profilers such as Nsight Systems draw above the kernels launched inside them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from splitwiser_lab.model.batch import Batch


def batch_range(lane: str, batch: Batch) -> AbstractContextManager[object]:
    """A range named after the lane, the phase and the tokens of a batch; nothing where PyTorch has no CUDA."""
    if torch.version.cuda is None:
        return nullcontext()
    tokens = batch.prefill_tokens + len(batch.decode)
    return torch.cuda.nvtx.range(f"{lane}: {batch.phase}, {tokens} tokens, {len(batch.sequences)} sequences")
