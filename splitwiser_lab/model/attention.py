"""Attention over the paged pool, for any mix of decode and prefill tokens.

`AttentionInput` says where the tokens of a batch lie. `sdpa` is built on PyTorch's own kernel alone,
runs on any device, and is the reference that every faster attention must equal.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from splitwiser_lab.model.batch import Batch

_BLOCK = 128  # queries


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One prefilling sequence: its rows in the packed batch, where they start in it, and its pages."""

    rows: slice
    start: int
    context: int
    pages: torch.Tensor  # [ceil(context / page_size)]


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """Where each token of a packed batch lies. T tokens, the first B of them one decode token each."""

    slots: torch.Tensor  # [T] page * page_size + row: where keys and values of the token go
    begun: torch.Tensor | None  # pages of which this batch writes the first row but not all
    decode_tables: torch.Tensor  # [B, pages of the longest] padded with the sequence's own last page
    decode_mask: torch.Tensor  # [B, 1, 1, pages of the longest * page_size] 0 where the token exists, else -inf
    prefill: list[PrefillSpan]

    @classmethod
    def of(cls, batch: Batch, page_size: int, device: str, dtype: torch.dtype) -> AttentionInput:
        """Read it off a batch."""
        slots: list[int] = []
        begun: list[int] = []
        for sequence in batch.sequences:
            table, start, end = sequence.block_table, sequence.start, sequence.context
            slots += [table[p // page_size] * page_size + p % page_size for p in range(start, end)]
            last = (end - 1) // page_size
            if start <= last * page_size and end % page_size:
                begun.append(table[last])
        used = [s.block_table[: -(-s.context // page_size)] for s in batch.decode]
        longest = max(map(len, used), default=0)
        padded = [pages + pages[-1:] * (longest - len(pages)) for pages in used]
        tables = torch.tensor(padded, dtype=torch.int64).view(len(used), longest)
        contexts = torch.tensor([s.context for s in batch.decode], dtype=torch.int64)
        beyond = torch.arange(longest * page_size) >= contexts[:, None]  # [B, S]
        mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)
        prefill, row = [], len(batch.decode)
        for s in batch.prefill:
            pages = torch.tensor(s.block_table[: -(-s.context // page_size)], device=device)
            prefill.append(PrefillSpan(slice(row, row + len(s.tokens)), s.start, s.context, pages))
            row += len(s.tokens)
        return cls(
            torch.tensor(slots, device=device),
            torch.tensor(begun, device=device) if begun else None,
            tables.to(device),
            mask[:, None, None].to(device),
            prefill,
        )


def store(
    keys: torch.Tensor, values: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor], where: AttentionInput
) -> None:
    """Write `keys` and `values` [T, H_kv, D] to their places in a layer's pages [P, page_size, H_kv, D].

    A page is emptied when its first row is written: attention gives the rows beyond the context no weight,
    but an infinity that a former owner left there would still make a NaN.
    """
    for new, pages in zip((keys, values), pool, strict=True):
        if where.begun is not None:
            pages.index_fill_(0, where.begun, 0.0)
        pages.view(-1, *new.shape[1:]).index_copy_(0, where.slots, new)


def sdpa(q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, where: AttentionInput) -> torch.Tensor:
    """`q` [T, H, D] against pages [P, page_size, H_kv, D] -> [T, H, D].

    All decode tokens go in one call, padded to the longest; prefilling sequences go one by one.
    """
    out = torch.empty_like(q)
    batch = len(where.decode_tables)
    if batch:
        flat = where.decode_tables.view(-1)
        k, v = _gather(key_pages, flat, 0), _gather(value_pages, flat, 1)  # [B * pages * page_size, H_kv, D]
        k, v = (t.view(batch, -1, *t.shape[1:]).transpose(1, 2) for t in (k, v))  # [B, H_kv, S, D]
        # The query heads of a group share their keys: as rows of one product they read them once.
        grouped = q[:batch].view(batch, k.shape[1], -1, q.shape[-1])  # [B, H_kv, H / H_kv, D]
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=where.decode_mask)
        out[:batch] = attended.reshape(batch, *q.shape[1:])
    attend_prefill(q, key_pages, value_pages, where.prefill, out)
    return out


def attend_prefill(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, spans: Sequence[PrefillSpan], out: torch.Tensor
) -> None:
    """Attention of prefilling sequences one by one, into their rows of `out` [T, H, D]."""
    for span in spans:
        k, v = (_gather(p, span.pages, i)[: span.context] for i, p in enumerate((key_pages, value_pages)))
        if q.device.type == "cpu":
            _causal_in_blocks(q[span.rows], k, v, span.start, out[span.rows])
            continue
        k, v = (t.transpose(0, 1)[None] for t in (k, v))  # [1, H_kv, S, D]
        queries = q[span.rows].transpose(0, 1)[None]  # [1, H, n, D]
        first = span.start == 0
        mask = None if first else _causal_from(span.start, span.context, q.device)
        gqa = k.shape[1] != queries.shape[1]
        attended = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, is_causal=first, enable_gqa=gqa)
        out[span.rows] = attended[0].transpose(0, 1)  # [n, H, D]


def _causal_from(start: int, context: int, device: torch.device) -> torch.Tensor:
    """Mask [context - start, context]: the token at position start + i sees all up to itself."""
    return torch.ones(context - start, context, dtype=torch.bool, device=device).tril(start)


def _causal_in_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, out: torch.Tensor) -> None:
    """Queries `q` [n, H, D] at positions `start`, ... against `k` and `v` [start + n, H_kv, D], into `out` [n, H, D].

    Block by block of queries, so that a CPU computes no more beyond the diagonal than a block's corner; the
    query heads of a group are rows of one product, as in decode.
    """
    kv_heads, dim = k.shape[1:]
    groups = q.shape[1] // kv_heads
    for first in range(0, len(q), _BLOCK):
        rows = min(_BLOCK, len(q) - first)
        end = start + first + rows
        block = q[first : first + rows].view(rows, kv_heads, groups, dim).permute(1, 2, 0, 3)  # [H_kv, G, rows, D]
        keys, values = (t[:end].transpose(0, 1)[None] for t in (k, v))  # [1, H_kv, end, D]
        room = 1 << (end - 1).bit_length()
        mask = _triangle_after(room, groups, q.dtype)[:, :rows, room + rows - end : room + rows].flatten(0, 1)
        folded = block.reshape(1, kv_heads, groups * rows, dim)
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        attended = attended.view(kv_heads, groups, rows, dim).permute(2, 0, 1, 3)  # [rows, H_kv, G, D]
        out[first : first + rows] = attended.reshape(rows, -1, dim)


@functools.lru_cache(maxsize=8)
def _triangle_after(room: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [groups, block, room + block]: `room` columns that all see, then the causal triangle."""
    mask = torch.zeros(_BLOCK, room + _BLOCK, dtype=dtype)
    mask[:, room:] = torch.full((_BLOCK, _BLOCK), -torch.inf, dtype=dtype).triu(1)
    return mask.expand(groups, -1, -1).contiguous()


class _Workspace(threading.local):
    """Memory kept from call to call. Each thread has its own, since two engines may run at the same time."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.dtype, int], torch.Tensor] = {}


_workspace = _Workspace()


def _gather(pages: torch.Tensor, index: torch.Tensor, place: int) -> torch.Tensor:
    """The pages named by `index` [n], one after the other: [n * page_size, H_kv, D].

    On a CPU they land in memory kept from call to call, since fresh memory costs far more than the copy.
    """
    rows = pages.view(pages.shape[0], -1)
    if pages.device.type != "cpu":
        return rows.index_select(0, index).view(-1, *pages.shape[2:])
    need = index.numel() * rows.shape[1]
    kept, key = _workspace.kept, (pages.dtype, place)
    if key not in kept or kept[key].numel() < need:
        with torch.inference_mode(False):  # a caller in that mode must not leave memory that only it can write to
            kept[key] = torch.empty(2 * need, dtype=pages.dtype)
    out = kept[key][:need].view(index.numel(), rows.shape[1])
    return torch.index_select(rows, 0, index, out=out).view(-1, *pages.shape[2:])
