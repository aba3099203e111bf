"""A kernel whose blocks note the SM they ran on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCKS = 20_000


@triton.jit
def _note_sm(out, turns):
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    value = tl.program_id(0).to(tl.float32)
    for _ in range(turns):  # long enough that no SM stays idle
        value = value * 1.0001 + 1.0
    tl.store(out + tl.program_id(0), sm + (value < 0).to(tl.int32))


def sms_used(stream: torch.cuda.Stream) -> set[int]:
    """Numbers of the SMs on which work of this stream ran."""
    out = torch.full((BLOCKS,), -1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        _note_sm[(BLOCKS,)](out, 2000)
    stream.synchronize()
    return set(out.tolist())
