"""Attention that reads keys and values from their pages, in Triton: one kernel for each phase.

Decode is limited by memory, so its kernel splits the contexts of a batch into parts of equal length
(split KV, as in Flash-Decoding): a few long sequences fill the GPU as well as many short ones. Prefill
is limited by arithmetic, so its kernel takes a block of queries and walks over all keys before them
(FlashAttention-2, Dao, arXiv 2307.08691). Both read ragged lengths in one launch. They know page
tables and lengths; they do not know which kernel suits which device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _token_offsets(table, tokens, alive, page_stride, token_stride, PAGE: tl.constexpr):
    """Where `tokens` [N] of one sequence lie in a layer's pages, in elements; dead ones at its first page."""
    pages = tl.load(table + tokens // PAGE, mask=alive, other=0)
    return pages.to(tl.int64) * page_stride + (tokens % PAGE) * token_stride


@triton.jit
def _rotated(x, offsets, mask, d, cos, sin, D: tl.constexpr, ROTATE: tl.constexpr):
    """Numbers `d` of the heads at `offsets`, turned by their position: rotary embedding, pairs half a head apart."""
    here = tl.load(x + offsets + d, mask=mask, other=0.0)
    if ROTATE:
        half: tl.constexpr = D // 2
        partner = tl.load(x + offsets + tl.where(d < half, d + half, d - half), mask=mask, other=0.0).to(tl.float32)
        turned = here.to(tl.float32) * cos + tl.where(d < half, -partner, partner) * sin
        here = turned.to(here.dtype)
    return here


@triton.jit
def decode_kernel(
    qk,  # [B, H + H_kv, D], rows `qk_stride` apart
    new_values,  # [B, H_kv, D], rows `v_stride` apart
    keys,  # [P, PAGE, H_kv, D] of one layer
    values,
    out,  # [B, H, D]
    sums,  # [items, H_kv, GROUP, D] float32: weighted values of each part
    maxima,  # [items, H_kv, GROUP] float32: largest score of each part, base 2
    weights,  # [items, H_kv, GROUP] float32: sum of its weights
    arrived,  # [B, H_kv] int32, all 0 between launches
    pages,  # the block tables of all sequences, one after the other
    items,  # [items, 8] the parts of the contexts, as `paged.ITEM` names their numbers
    inv_freq,  # [D / 2] float32
    rope_scale,
    scale,  # 1 / sqrt(D) / ln(2)
    qk_stride,
    v_stride,
    page_stride,
    token_stride,
    GROUP: tl.constexpr,  # query heads that share a head of keys
    BLOCK_G: tl.constexpr,  # GROUP, padded to what a matrix product takes
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,  # matrix units, or (float32, old GPUs) plain sums
    ROTATE: tl.constexpr,
):
    """One part of one sequence for one head of keys; who finishes a sequence last, merges its parts.

    Queries are rotated here, and whoever has a sequence's last part also rotates and stores its new key and
    value: at decode a kernel that did only this would take longer to launch than to run.
    """
    head, item = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(0)
    this = items + item * 8  # all are read at once: each load that waits for another costs a microsecond
    row = tl.load(this)
    if row < 0:
        return
    start, end = tl.load(this + 1), tl.load(this + 2)
    table, part = pages + tl.load(this + 3), tl.load(this + 4)
    first_part, parts, context = tl.load(this + 5), tl.load(this + 6), tl.load(this + 7)

    g, d, n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = (g[:, None] < GROUP) & (d[None, :] < D)
    cos, sin = tl.full([BLOCK_D], 1.0, tl.float32), tl.full([BLOCK_D], 0.0, tl.float32)
    if ROTATE:
        angle = (context - 1).to(tl.float32) * tl.load(inv_freq + d % (D // 2), mask=d < D, other=0.0)
        cos = (tl.cos(angle) * rope_scale).to(qk.dtype.element_ty).to(tl.float32)
        sin = (tl.sin(angle) * rope_scale).to(qk.dtype.element_ty).to(tl.float32)
    mine = qk + row.to(tl.int64) * qk_stride
    queries = _rotated(
        mine, (head * GROUP + g[:, None]) * D, inside, d[None, :], cos[None, :], sin[None, :], D, ROTATE
    )  # [G, D]
    last = end == context
    stored = (d < D) & last
    new_key = _rotated(mine, (kv_heads * GROUP + head) * D, stored, d, cos, sin, D, ROTATE)  # [D]
    new_value = tl.load(new_values + row.to(tl.int64) * v_stride + head * D + d, mask=stored, other=0.0)
    page = tl.load(table + (context - 1) // PAGE).to(tl.int64)
    to = page * page_stride + (context - 1) % PAGE * token_stride + head * D + d
    tl.store(keys + to, new_key, mask=stored)
    tl.store(values + to, new_value, mask=stored)
    # The new token is attended to from registers, the others from their pages.
    score = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale  # [G]
    top = tl.where(last, score, float("-inf"))
    weight = tl.zeros([BLOCK_G], tl.float32) + tl.where(last, 1.0, 0.0)
    total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32) + new_value.to(tl.float32)[None, :]  # zeros but in the last part
    end = tl.where(last, end - 1, end)
    for begin in range(start, end, BLOCK_N):
        tokens = begin + n
        alive = tokens < end
        at = _token_offsets(table, tokens, alive, page_stride, token_stride, PAGE) + head * D  # [N]
        where = at[:, None] + d[None, :]
        there = alive[:, None] & (d[None, :] < D)
        k = tl.load(keys + where, mask=there, other=0.0)  # [N, D]
        if DOT:
            scores = tl.dot(queries, tl.trans(k))  # [G, N]
        else:
            scores = tl.sum(queries.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
        scores = tl.where(alive[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])  # [G, N]
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(shares, 1)
        v = tl.load(values + where, mask=there, other=0.0)  # [N, D]
        total = total * shrink[:, None]
        if DOT:
            total = tl.dot(shares.to(v.dtype), v, total)
        else:
            total += tl.sum(shares[:, :, None] * v.to(tl.float32)[None, :, :], 1)
        top = new_top

    target = out + row.to(tl.int64) * kv_heads * GROUP * D + (head * GROUP + g[:, None]) * D + d[None, :]
    if parts == 1:
        tl.store(target, (total / weight[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        slot = (part * kv_heads + head) * GROUP + g  # [G]
        tl.store(maxima + slot, top, mask=g < GROUP)
        tl.store(weights + slot, weight, mask=g < GROUP)
        tl.store(sums + slot[:, None] * D + d[None, :], total, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them says so
        before = tl.atomic_add(arrived + row * kv_heads + head, 1, sem="acq_rel")
        if before == parts - 1:
            top = tl.full([BLOCK_G], float("-inf"), tl.float32)
            weight = tl.zeros([BLOCK_G], tl.float32)
            total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            for other in range(parts):
                # Past the first-level cache (.cg): other multiprocessors wrote these during this launch.
                slot = ((first_part + other) * kv_heads + head) * GROUP + g
                part_top = tl.load(maxima + slot, mask=g < GROUP, other=0.0, cache_modifier=".cg")
                part_weight = tl.load(weights + slot, mask=g < GROUP, other=1.0, cache_modifier=".cg")
                part_sum = tl.load(sums + slot[:, None] * D + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
                new_top = tl.maximum(top, part_top)
                shrink, grow = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
                weight = weight * shrink + part_weight * grow
                total = total * shrink[:, None] + part_sum * grow[:, None]
                top = new_top
            tl.store(target, (total / weight[:, None]).to(out.dtype.element_ty), mask=inside)
            tl.store(arrived + row * kv_heads + head, 0)


@triton.jit
def _attend_block(
    queries,
    top,
    weight,
    total,
    keys,
    values,
    table,
    begin,
    position,
    limit,
    scale,
    page_stride,
    token_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Fold the keys `begin` ... `begin` + BLOCK_N into the running softmax of a block of queries."""
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tokens = begin + tl.arange(0, BLOCK_N)
    # Before the queries' own block every key is there: a constant mask costs nothing.
    alive = tokens < limit if CAUSAL else tl.full([BLOCK_N], 1, tl.int1)
    at = _token_offsets(table, tokens, alive, page_stride, token_stride, PAGE)  # [N]
    where = at[:, None] + d[None, :]
    there = alive[:, None] & (d[None, :] < D)
    k = tl.load(keys + where, mask=there, other=0.0)  # [N, D]
    scores = tl.dot(queries, tl.trans(k))  # [M, N]
    if CAUSAL:
        scores = tl.where(tokens[None, :] <= position + m[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    shares = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    weight = weight * shrink + tl.sum(shares, 1)
    v = tl.load(values + where, mask=there, other=0.0)  # [N, D]
    total = tl.dot(shares.to(v.dtype), v, total * shrink[:, None])
    return new_top, weight, total


@triton.jit(do_not_specialize=["decoding"])
def prefill_kernel(
    q,  # [n, H, D] of the prompts
    keys,  # [P, PAGE, H_kv, D] of one layer, the queries' own keys among them
    values,
    out,  # [T, H, D]
    pages,  # as in `decode_kernel`
    block_row,  # [blocks] the row of a block's first query in the batch
    block_tokens,  # [blocks] its queries, 0 for none
    block_position,  # [blocks] the position of its first query in its sequence
    block_page,  # [blocks] where the sequence's block table begins in `pages`
    decoding,  # rows of the batch before the prompts'
    scale,
    q_stride,
    page_stride,
    token_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of queries of one sequence for one head, over all keys up to each query's own."""
    head, block = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0)
    count = tl.load(block_tokens + block)
    if count == 0:
        return
    row, position = tl.load(block_row + block), tl.load(block_position + block)
    table = pages + tl.load(block_page + block)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows = (row + m).to(tl.int64)[:, None]
    inside = (m[:, None] < count) & (d[None, :] < D)
    queries = tl.load(q + (rows - decoding) * q_stride + head * D + d[None, :], mask=inside, other=0.0)  # [M, D]
    keys += head // GROUP * D
    values += head // GROUP * D
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    limit = position + count
    open_to_all = (position + 1) // BLOCK_N * BLOCK_N  # keys before this are seen by every query of the block
    for begin in range(0, open_to_all, BLOCK_N):
        top, weight, total = _attend_block(
            queries, top, weight, total, keys, values, table, begin, position, limit, scale,
            page_stride, token_stride, D, BLOCK_M, BLOCK_D, PAGE, BLOCK_N, False,
        )  # fmt: skip
    for begin in range(open_to_all, limit, BLOCK_N):
        top, weight, total = _attend_block(
            queries, top, weight, total, keys, values, table, begin, position, limit, scale,
            page_stride, token_stride, D, BLOCK_M, BLOCK_D, PAGE, BLOCK_N, True,
        )  # fmt: skip
    target = out + rows * (heads * D) + head * D + d[None, :]
    tl.store(target, (total / weight[:, None]).to(out.dtype.element_ty), mask=inside)
