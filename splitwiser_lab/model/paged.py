"""What a GPU must know of a batch, packed into one buffer of numbers that travels there in one copy.

Everything is worked out on the host with NumPy; the device gets views into the one buffer. A batch
may be padded to a fixed number of decode rows, so that a CUDA graph can be replayed on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from splitwiser_lab.model.attention import PrefillSpan
from splitwiser_lab.model.batch import PENDING, Batch, Sequence

Numbers = NDArray[np.int32]

QUERY_BLOCK = 128  # queries that a prefill kernel takes at once
_PART_STEP = 64  # parts of a context are multiples of so many tokens
_LEAST_PART = 128  # a shorter part costs more to merge than it saves
_ALIGN = 4  # numbers, 16 bytes: Triton compiles anew for an address that is less aligned


@dataclass(frozen=True, slots=True)
class PagedInput:
    """Where the T tokens of a batch lie, as int32 tensors. B rows decode (they come first), S sequences in all.

    `tokens` holds -1 - i where the device itself picked the token, and keeps it at place i of its board.
    """

    spans: tuple[PrefillSpan, ...]  # the prefilling sequences, for attention that takes them one by one
    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T] page * page_size + row for its keys and values, -1 where padded
    ends: torch.Tensor  # [E] rows after which a token is picked
    board: torch.Tensor  # [E] the place on the board where it is kept
    contexts: torch.Tensor  # [B] tokens that a decoding row attends to, 0 where padded
    first_page: torch.Tensor  # [B] where its block table begins in `pages`
    row_part: torch.Tensor  # [B] the number of its first part (contexts are cut into parts)
    row_tokens: torch.Tensor  # [B] tokens in each of its parts
    item_row: torch.Tensor  # [items] the row that a part belongs to, -1 for none
    item_part: torch.Tensor  # [items] which of its parts it is
    block_row: torch.Tensor  # [blocks of queries] the row of its first query
    block_tokens: torch.Tensor  # [blocks] queries in it
    block_position: torch.Tensor  # [blocks] the position of its first query
    block_page: torch.Tensor  # [blocks] where its sequence's block table begins in `pages`
    pages: torch.Tensor  # the block tables, one after the other

    @classmethod
    def views(cls, buffer: torch.Tensor, packed: Packed) -> PagedInput:
        """Cut `buffer`, which holds the numbers of `packed` (and more room for pages), into tensors."""
        *starts, pages = packed.offsets
        tensors = [buffer[start : start + size] for start, size in zip(starts, packed.sizes, strict=True)]
        tensors.append(buffer[pages:])
        spans = [PrefillSpan(rows, start, context, tensors[-1][at]) for rows, start, context, at in packed.spans]
        return cls(tuple(spans), *tensors)


@dataclass(frozen=True, slots=True)
class Packed:
    """The numbers of a `PagedInput` in one array, where each field begins in it, and their sizes (pages: the rest)."""

    numbers: Numbers
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    spans: tuple[tuple[slice, int, int, slice], ...]  # rows, start, context and place in the pages


def pack(batch: Batch, page_size: int, parts: int, no_place: int, rows: int | None = None) -> Packed:
    """Work out all numbers of a batch.

    Decode contexts are cut into about `parts` parts, at most so many plus one a row. `rows` pads a
    batch that only decodes; padded rows keep their token at `no_place` of the board.
    """
    sequences = batch.sequences
    decoding = len(batch.decode)
    rows = decoding if rows is None else rows
    pad = rows - decoding
    lengths = _array([len(s.block_table) for s in sequences])
    pages = _array(list(chain.from_iterable(s.block_table for s in sequences)))
    first_page = _starts(lengths)
    starts = _array([s.start for s in sequences])
    counts = _array([len(s.tokens) for s in sequences])
    first_row = _starts(counts)

    named = [_array([_named(s) for s in batch.decode]), *(_array(s.tokens) for s in batch.prefill)]
    tokens = np.concatenate(named, dtype=np.int32)
    owner = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(len(tokens), dtype=np.int32) - (first_row - starts)[owner]
    slots = pages[first_page[owner] + positions // page_size] * page_size + positions % page_size
    asked = np.array([s.sampling is not None for s in sequences], bool)
    arrays = [
        _padded(tokens, pad, 0),
        _padded(positions, pad, 0),
        _padded(slots, pad, -1),
        _padded((first_row + counts - 1)[asked], pad, 0),
        _padded(pages[first_page[asked]], pad, no_place),
        *_parts((starts + counts)[:decoding], first_page[:decoding], rows, parts if rows else 0),
        *_query_blocks(*(each[decoding:] for each in (starts, counts, first_row, first_page))),
    ]
    sizes = tuple(map(len, arrays))
    offsets = tuple(accumulate((-(-size // _ALIGN) * _ALIGN for size in sizes), initial=0))
    numbers = np.zeros(offsets[-1] + len(pages), np.int32)
    for offset, array in zip(offsets, [*arrays, pages], strict=True):
        numbers[offset : offset + len(array)] = array
    spans = [
        (slice(row, row + len(s.tokens)), s.start, s.context, slice(page, page - (-s.context // page_size)))
        for s, row, page in zip(
            batch.prefill, first_row[decoding:].tolist(), first_page[decoding:].tolist(), strict=True
        )
    ]
    return Packed(numbers, offsets, sizes, tuple(spans))


def _array(numbers: list[int]) -> Numbers:
    return np.array(numbers, np.int32)


def _padded(array: NDArray[np.integer[Any]], count: int, value: int) -> NDArray[np.integer[Any]]:
    return np.concatenate((array, np.full(count, value, np.int32)))


def _starts(counts: Numbers) -> Numbers:
    return np.cumsum(counts, dtype=np.int32) - counts


def _named(sequence: Sequence) -> int:
    """A decoding sequence's token, or the name of its place on the board."""
    token = sequence.tokens[0]
    return -1 - sequence.block_table[0] if token == PENDING else token


def _parts(contexts: Numbers, first_page: Numbers, rows: int, parts: int) -> list[NDArray[np.integer[Any]]]:
    """`contexts` ... `item_part` of a PagedInput: each context in equal parts, together about `parts` of them."""
    share = max(-(-int(contexts.sum()) // max(parts, 1)), _LEAST_PART)
    pieces = -(-contexts // share)
    tokens = -(-contexts // (pieces * _PART_STEP)) * _PART_STEP
    count = -(-contexts // tokens)
    row_part = _starts(count)
    row = np.repeat(np.arange(len(contexts)), count)
    part = np.arange(len(row)) - row_part[row]
    longest_first = np.argsort(part * tokens[row] - np.minimum((part + 1) * tokens[row], contexts[row]), kind="stable")
    pad, free = rows - len(contexts), rows + parts - len(row)
    return [
        _padded(contexts, pad, 0),
        _padded(first_page, pad, 0),
        _padded(row_part, pad, 0),
        _padded(tokens, pad, 1),
        _padded(row[longest_first], free, -1),
        _padded(part[longest_first], free, 0),
    ]


def _query_blocks(
    starts: Numbers, counts: Numbers, first_row: Numbers, first_page: Numbers
) -> list[NDArray[np.integer[Any]]]:
    """Row, queries, position and page of each block of queries; those with the most keys first, to end together."""
    blocks = -(-counts // QUERY_BLOCK)
    owner = np.repeat(np.arange(len(counts)), blocks)
    offset = (np.arange(len(owner)) - _starts(blocks)[owner]) * QUERY_BLOCK
    position = starts[owner] + offset
    order = np.argsort(-position, kind="stable")
    queries = np.minimum(counts[owner] - offset, QUERY_BLOCK)
    return [each[order] for each in (first_row[owner] + offset, queries, position, first_page[owner])]
