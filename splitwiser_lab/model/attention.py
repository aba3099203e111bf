"""Attention over the paged pool, for any mix of decode and prefill tokens.

`AttentionInput` says where the tokens of a batch lie; a backend is a function from queries and pages
to outputs. `sdpa` is built on PyTorch's own kernel alone, runs on any device, and is the reference
that every faster backend must equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from splitwiser_lab.model.batch import Batch


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
    decode_tables: torch.Tensor  # [B, pages of the longest] padded with page 0
    decode_mask: torch.Tensor  # [B, 1, 1, pages of the longest * page_size] True where the token exists
    prefill: list[PrefillSpan]

    @classmethod
    def of(cls, batch: Batch, page_size: int, device: str) -> AttentionInput:
        slots: list[int] = []
        for sequence in batch.sequences:
            table = sequence.block_table
            positions = range(sequence.start, sequence.context)
            slots += [table[p // page_size] * page_size + p % page_size for p in positions]
        used = [s.block_table[: -(-s.context // page_size)] for s in batch.decode]
        longest = max(map(len, used), default=0)
        tables = torch.tensor([t + [0] * (longest - len(t)) for t in used], dtype=torch.int64).view(len(used), longest)
        contexts = torch.tensor([s.context for s in batch.decode], dtype=torch.int64)
        mask = torch.arange(longest * page_size) < contexts[:, None]  # [B, S]
        prefill, row = [], len(batch.decode)
        for s in batch.prefill:
            pages = torch.tensor(s.block_table[: -(-s.context // page_size)], device=device)
            prefill.append(PrefillSpan(slice(row, row + len(s.tokens)), s.start, s.context, pages))
            row += len(s.tokens)
        return cls(torch.tensor(slots, device=device), tables.to(device), mask[:, None, None].to(device), prefill)


Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionInput], torch.Tensor]


def store(
    keys: torch.Tensor, values: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor
) -> None:
    """Write `keys` and `values` [T, H_kv, D] to their places in a layer's pages [P, page_size, H_kv, D]."""
    for new, pages in zip((keys, values), pool, strict=True):
        pages.view(-1, *new.shape[1:]).index_copy_(0, slots, new)


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
    for span in where.prefill:
        k, v = (_gather(p, span.pages, i)[: span.context] for i, p in enumerate((key_pages, value_pages)))
        k, v = (t.transpose(0, 1)[None] for t in (k, v))  # [1, H_kv, S, D]
        queries = q[span.rows].transpose(0, 1)[None]  # [1, H, n, D]
        first = span.start == 0
        mask = None if first else _causal_from(span.start, span.context, q.device)
        gqa = k.shape[1] != queries.shape[1]
        attended = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, is_causal=first, enable_gqa=gqa)
        out[span.rows] = attended[0].transpose(0, 1)  # [n, H, D]
    return out


def _causal_from(start: int, context: int, device: torch.device) -> torch.Tensor:
    """Mask [context - start, context]: the token at position start + i sees all up to itself."""
    return torch.ones(context - start, context, dtype=torch.bool, device=device).tril(start)


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
        kept[key] = torch.empty(2 * need, dtype=pages.dtype)
    out = kept[key][:need].view(index.numel(), rows.shape[1])
    return torch.index_select(rows, 0, index, out=out).view(-1, *pages.shape[2:])


BACKENDS: dict[str, Backend] = {"sdpa": sdpa}
