"""What a layer does between its matrix products, in one Triton kernel each instead of several.

At decode each of these moves little memory, so that launching it is what it costs; at prefill each
saves a pass over the activations. They compute in float32 and round once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(hidden, delta, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """hidden += delta; out = RMS norm of hidden, times weight. One program a row; all are contiguous [T, SIZE]."""
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    row = tl.program_id(0).to(tl.int64) * SIZE
    x = tl.load(hidden + row + at, mask=inside, other=0.0)
    if ADD:
        change = tl.load(delta + row + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + change.to(tl.float32)).to(x.dtype)
        tl.store(hidden + row + at, x, mask=inside)
    x = x.to(tl.float32)
    rms = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    scaled = x * rms * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_store_kernel(
    q,  # [T, H, D], rows `q_stride` apart
    k,  # [T, H_kv, D]
    v,
    q_out,  # [T, H, D] contiguous
    keys,  # a layer's pages [P, PAGE, H_kv, D], contiguous
    values,
    positions,  # [T]
    slots,  # [T] page * PAGE + row, -1 where the batch is padded
    inv_freq,  # [D / 2] float32
    rope_scale,
    q_stride,
    k_stride,
    v_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotary embedding of queries and keys (pairs half a head apart); keys and values go to their pages."""
    t = tl.program_id(0).to(tl.int64)
    kind = q.dtype.element_ty
    half: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK_HALF)
    angle = tl.load(positions + t).to(tl.float32) * tl.load(inv_freq + d, mask=d < half, other=0.0)
    cos = (tl.cos(angle) * rope_scale).to(kind).to(tl.float32)[None, :]
    sin = (tl.sin(angle) * rope_scale).to(kind).to(tl.float32)[None, :]

    h = tl.arange(0, BLOCK_H)[:, None]
    inside = (h < HEADS) & (d[None, :] < half)
    at = h * D + d[None, :]
    low = tl.load(q + t * q_stride + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(q + t * q_stride + at + half, mask=inside, other=0.0).to(tl.float32)
    to = q_out + t * HEADS * D + at
    tl.store(to, (low * cos - high * sin).to(kind), mask=inside)
    tl.store(to + half, (high * cos + low * sin).to(kind), mask=inside)

    slot = tl.load(slots + t)
    h = tl.arange(0, BLOCK_KV)[:, None]
    inside = (h < KV_HEADS) & (d[None, :] < half) & (slot >= 0)
    at = h * D + d[None, :]
    low = tl.load(k + t * k_stride + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(k + t * k_stride + at + half, mask=inside, other=0.0).to(tl.float32)
    to = slot.to(tl.int64) * KV_HEADS * D + at
    tl.store(keys + to, (low * cos - high * sin).to(kind), mask=inside)
    tl.store(keys + to + half, (high * cos + low * sin).to(kind), mask=inside)
    tl.store(values + to, tl.load(v + t * v_stride + at, mask=inside), mask=inside)
    tl.store(values + to + half, tl.load(v + t * v_stride + at + half, mask=inside), mask=inside)


@triton.jit
def store_kernel(k, v, keys, values, slots, k_stride, v_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Keys and values [T, SIZE] to their pages, as they are: for models with learned positions."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    slot = tl.load(slots + t)
    inside = (at < SIZE) & (slot >= 0)
    to = slot.to(tl.int64) * SIZE + at
    tl.store(keys + to, tl.load(k + t * k_stride + at, mask=inside), mask=inside)
    tl.store(values + to, tl.load(v + t * v_stride + at, mask=inside), mask=inside)


@triton.jit
def gate_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up, where gate and up are the halves of each row [T, 2 * SIZE] -> [T, SIZE]."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def resolve_kernel(tokens, board, out, count, BLOCK: tl.constexpr):
    """Token ids of a batch: those the host named, and for -1 - i what the device picked last for board place i."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + at, mask=at < count, other=0)
    picked = tl.load(board + (-1 - token), mask=(at < count) & (token < 0), other=0)
    picked = tl.maximum(picked, 0)  # where no token could be picked, nobody will read what comes of this one
    tl.store(out + at, tl.where(token < 0, picked, token), mask=at < count)


@triton.jit
def argmax_parts_kernel(logits, tops, places, size, stride, not_a_number: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of each BLOCK of logits [rows, size], and where it stands; the first of equals.

    A block with a NaN has `not_a_number` for a place.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < size, other=float("-inf")).to(tl.float32)
    broken = tl.max((values != values).to(tl.int32), 0) > 0
    top, place = tl.max(values, 0, return_indices=True)
    slot = row * tl.num_programs(1) + part
    tl.store(tops + slot, top)
    tl.store(places + slot, tl.where(broken, not_a_number, part * BLOCK + place))


@triton.jit
def argmax_kernel(tops, places, board_places, tokens, board, parts, not_a_number: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of each row's parts is the picked token: it goes to `tokens` [rows] and onto the board.

    `not_a_number` where any part has it for a place.
    """
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    values = tl.load(tops + row * parts + at, mask=at < parts, other=float("-inf"))
    broken = tl.min(tl.load(places + row * parts + at, mask=at < parts, other=0), 0) == not_a_number
    _, part = tl.max(values, 0, return_indices=True)
    token = tl.where(broken, not_a_number, tl.load(places + row * parts + tl.minimum(part, parts - 1)))
    tl.store(tokens + row, token)
    tl.store(board + tl.load(board_places + row), token)
