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
# A part of a context: its row (-1 for none), its first token and the one after its last, where the row's block
# table begins in `pages`, its own place in scratch memory, that of the row's first part, how many parts the row
# has, and how many tokens.
ITEM = ("row", "start", "end", "first_page", "part", "first_part", "parts", "context")
_ALIGN = 4  # numbers, 16 bytes: Triton compiles anew for an address that is less aligned


@dataclass(frozen=True, slots=True)
class PagedInput:
    """Where the T tokens of a batch lie, as int32 tensors. B rows decode (they come first), S sequences in all.

    `tokens` holds -1 - i where the device itself picked the token, and keeps it at place i of its board.
    """

    rows: int  # B
    spans: tuple[PrefillSpan, ...]  # the prompts, counted from row B, for attention that takes them one by one
    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T] page * page_size + row for its keys and values, -1 where padded
    ends: torch.Tensor  # [E] rows after which a token is picked: one a decoding row, then as many as there are prompts
    board: torch.Tensor  # [E] the place on the board where it is kept
    items: torch.Tensor  # [items * 8] parts of the decoding rows' contexts, see `ITEM`
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
        return cls(packed.shape.rows, tuple(spans), *tensors)


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a batch is, or is padded to be: decoding rows, tokens of prompts, and prompts."""

    rows: int
    tokens: int = 0
    prompts: int = 0

    @classmethod
    def of(cls, batch: Batch) -> Shape:
        """Without padding."""
        return cls(len(batch.decode), batch.prefill_tokens, len(batch.prefill))

    @property
    def blocks(self) -> int:
        """Blocks of queries that suffice, however the tokens are spread over the prompts."""
        return self.tokens // QUERY_BLOCK + self.prompts


@dataclass(frozen=True, slots=True)
class Packed:
    """The numbers of a `PagedInput` in one array, where each field begins in it, and their sizes (pages: the rest)."""

    numbers: Numbers
    shape: Shape
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    spans: tuple[tuple[slice, int, int, slice], ...]  # rows among the prompts', start, context, place in the pages


def pack(batch: Batch, page_size: int, parts: int, no_place: int, shape: Shape | None = None) -> Packed:
    """Work out all numbers of a batch whose decoding sequences all pick a token.

    Decode contexts are cut into about `parts` parts, at most so many plus one a row. `shape` pads the
    batch: padding writes nothing to the pool, and keeps its tokens at `no_place` of the board.
    """
    assert all(s.sampling is not None for s in batch.decode), "a sequence decodes in order to pick a token"
    shape = Shape.of(batch) if shape is None else shape
    sequences, decoding = batch.sequences, len(batch.decode)
    pad, blank = shape.rows - decoding, shape.tokens - batch.prefill_tokens
    lengths = _array([len(s.block_table) for s in sequences])
    pages = _array(list(chain.from_iterable(s.block_table for s in sequences)))
    first_page = _starts(lengths)
    starts = _array([s.start for s in sequences])
    counts = _array([len(s.tokens) for s in sequences])
    first_row = _starts(counts)  # before padding

    named = [_array([_named(s) for s in batch.decode]), *(_array(s.tokens) for s in batch.prefill)]
    tokens = np.concatenate(named, dtype=np.int32)
    owner = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(len(tokens), dtype=np.int32) - (first_row - starts)[owner]
    slots = pages[first_page[owner] + positions // page_size] * page_size + positions % page_size
    first_row[decoding:] += pad

    def rows(array: NDArray[np.integer[Any]], value: int) -> NDArray[np.integer[Any]]:
        return _padded(array, decoding, pad, blank, value)

    asked = np.array([s.sampling is not None for s in sequences], bool)
    spare = shape.prompts - int(asked[decoding:].sum())
    ends, places = (first_row + counts - 1)[asked], pages[first_page[asked]]
    prompts = (each[decoding:] for each in (starts, counts, first_row, first_page))
    arrays = [
        rows(tokens, 0),
        rows(positions, 0),
        rows(slots, -1),
        _padded(ends, decoding, pad, spare, 0),
        _padded(places, decoding, pad, spare, no_place),
        _items((starts + counts)[:decoding], first_page[:decoding], shape.rows, parts if shape.rows else 0),
        *_query_blocks(shape.blocks, *prompts),
    ]
    sizes = tuple(map(len, arrays))
    offsets = tuple(accumulate((-(-size // _ALIGN) * _ALIGN for size in sizes), initial=0))
    numbers = np.zeros(offsets[-1] + len(pages), np.int32)
    for offset, array in zip(offsets, [*arrays, pages], strict=True):
        numbers[offset : offset + len(array)] = array
    where = zip(
        batch.prefill, (first_row[decoding:] - shape.rows).tolist(), first_page[decoding:].tolist(), strict=True
    )
    spans = [
        (slice(row, row + len(s.tokens)), s.start, s.context, slice(page, page - (-s.context // page_size)))
        for s, row, page in where
    ]
    return Packed(numbers, shape, offsets, sizes, tuple(spans))


def _array(numbers: list[int]) -> Numbers:
    return np.array(numbers, np.int32)


def _padded(array: NDArray[np.integer[Any]], at: int, middle: int, end: int, value: int) -> NDArray[np.integer[Any]]:
    """`array` with `middle` times `value` put in before `at`, and `end` times at the end."""
    if not middle and not end:
        return array
    fill = np.full(middle + end, value, np.int32)
    return np.concatenate((array[:at], fill[:middle], array[at:], fill[middle:]))


def _starts(counts: Numbers) -> Numbers:
    return np.cumsum(counts, dtype=np.int32) - counts


def _named(sequence: Sequence) -> int:
    """A decoding sequence's token, or the name of its place on the board."""
    token = sequence.tokens[0]
    return -1 - sequence.block_table[0] if token == PENDING else token


def _items(contexts: Numbers, first_page: Numbers, rows: int, parts: int) -> Numbers:
    """`items` of a PagedInput, flat: each context in equal parts, together about `parts` of them, longest first."""
    share = max(-(-int(contexts.sum()) // max(parts, 1)), _LEAST_PART)
    pieces = -(-contexts // share)
    tokens = -(-contexts // (pieces * _PART_STEP)) * _PART_STEP
    count = -(-contexts // tokens)
    first_part = _starts(count)
    row = np.repeat(np.arange(len(contexts)), count)
    start = (np.arange(len(row)) - first_part[row]) * tokens[row]
    end = np.minimum(start + tokens[row], contexts[row])
    longest_first = np.argsort(start - end, kind="stable")
    items = np.full((rows + parts, len(ITEM)), -1, np.int32)
    of_row = (each[row] for each in (first_part, count, contexts))
    found = np.stack((row, start, end, first_page[row], np.arange(len(row)), *of_row), axis=1)
    items[: len(row)] = found[longest_first]
    return items.reshape(-1)


def _query_blocks(
    most: int, starts: Numbers, counts: Numbers, first_row: Numbers, first_page: Numbers
) -> list[NDArray[np.integer[Any]]]:
    """Row, queries, position and page of each block of queries; those with the most keys first, to end together."""
    blocks = -(-counts // QUERY_BLOCK)
    owner = np.repeat(np.arange(len(counts)), blocks)
    offset = (np.arange(len(owner)) - _starts(blocks)[owner]) * QUERY_BLOCK
    position = starts[owner] + offset
    order = np.argsort(-position, kind="stable")
    queries = np.minimum(counts[owner] - offset, QUERY_BLOCK)
    found = (first_row[owner] + offset, queries, position, first_page[owner])
    return [_padded(each[order], 0, 0, most - len(order), 0) for each in found]
