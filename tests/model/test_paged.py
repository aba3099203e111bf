"""What a GPU is told of a batch: every number worked out again, one token at a time."""

from __future__ import annotations

import random

import pytest
import torch

from splitwiser_lab.model.attention import AttentionInput
from splitwiser_lab.model.batch import GREEDY, PENDING, Batch, Sequence
from splitwiser_lab.model.choice import choose_kernels
from splitwiser_lab.model.paged import QUERY_BLOCK, PagedInput, pack

PAGE, PAGES = 8, 2000


def batch_of(contexts: list[int], spans: list[tuple[int, int]], pending: tuple[int, ...] = ()) -> Batch:
    deck = list(range(PAGES))
    random.Random(0).shuffle(deck)

    def sequence(start: int, tokens: list[int], asks: bool = True) -> Sequence:
        table = [deck.pop() for _ in range(-(-(start + len(tokens)) // PAGE))]
        return Sequence(tokens, start, table, GREEDY if asks else None)

    decode = [sequence(c - 1, [PENDING if i in pending else 100 + i]) for i, c in enumerate(contexts)]
    prefill = [sequence(s, [200 + i] * n, asks=i != 1) for i, (s, n) in enumerate(spans)]
    return Batch(decode, prefill)


def paged(batch: Batch, parts: int = 16, rows: int | None = None) -> PagedInput:
    packed = pack(batch, PAGE, parts, no_place=PAGES, rows=rows)
    return PagedInput.views(torch.from_numpy(packed.numbers), packed)


MIXED = batch_of([1, 70, 2500, 9], [(0, 300), (40, 20), (129, 128)], pending=(2,))


def test_tokens_positions_and_slots() -> None:
    where = paged(MIXED)
    sequences = MIXED.sequences
    assert where.tokens.tolist() == [100, 101, -1 - MIXED.decode[2].block_table[0], 103] + [
        t for s in MIXED.prefill for t in s.tokens
    ]
    assert where.positions.tolist() == [p for s in sequences for p in range(s.start, s.context)]
    assert where.slots.tolist() == AttentionInput.of(MIXED, PAGE, "cpu", torch.float32).slots.tolist()


def test_tokens_are_picked_at_the_ends_and_kept_at_first_pages() -> None:
    where = paged(MIXED)
    assert where.ends.tolist() == [0, 1, 2, 3, 4 + 299, 4 + 300 + 20 + 127], "the second prompt is not at its end"
    asked = [s for s in MIXED.sequences if s.sampling is not None]
    assert where.board.tolist() == [s.block_table[0] for s in asked]


@pytest.mark.parametrize("parts", [1, 3, 16, 200])
@pytest.mark.parametrize("contexts", [[1], [1, 70, 2500, 9], [64] * 9, [1000, 1000], [16000]])
def test_parts_cover_every_context_once(contexts: list[int], parts: int) -> None:
    where = paged(batch_of(contexts, []), parts)
    seen: list[list[range]] = [[] for _ in contexts]
    places = set()
    items = list(zip(where.item_row.tolist(), where.item_part.tolist(), strict=True))
    assert len(items) == len(contexts) + parts
    for row, part in items:
        if row < 0:
            continue
        tokens = where.row_tokens[row].item()
        seen[row].append(range(part * tokens, min((part + 1) * tokens, contexts[row])))
        places.add(where.row_part[row].item() + part)
    for context, ranges in zip(contexts, seen, strict=True):
        assert sorted(p for one in ranges for p in one) == list(range(context))
        assert all(len(one) > 0 for one in ranges)
    used = sum(row >= 0 for row, _ in items)
    assert places == set(range(used)), "each part has a place of its own in the scratch memory"
    lengths = [len(r) for ranges in seen for r in ranges]
    assert max(lengths) <= max(-(-sum(contexts) // parts), 128) + 63


def test_a_padded_batch_says_so() -> None:
    where = paged(batch_of([5, 70], []), parts=4, rows=6)
    assert where.contexts.tolist() == [5, 70, 0, 0, 0, 0]
    assert where.slots.tolist()[2:] == [-1] * 4
    assert where.board.tolist()[2:] == [PAGES] * 4
    assert (where.item_row == -1).sum() == 10 - 2
    empty = paged(Batch([], []), parts=4, rows=6)
    sizes = [getattr(empty, name).numel() for name in ("tokens", "board", "item_row")]
    assert sizes == [6, 6, 10] and (empty.item_row == -1).all()


def test_query_blocks_cover_every_prompt_token() -> None:
    where = paged(MIXED)
    rows = {}
    numbers = (where.block_row, where.block_tokens, where.block_position, where.block_page)
    for row, count, position, page in zip(*(t.tolist() for t in numbers), strict=True):
        assert 0 < count <= QUERY_BLOCK
        for i in range(count):
            rows[row + i] = (position + i, where.pages[page].item())
    expected, row = {}, len(MIXED.decode)
    for s in MIXED.prefill:
        for p in range(s.start, s.context):
            expected[row] = (p, s.block_table[0])
            row += 1
    assert rows == expected
    positions = where.block_position.tolist()
    assert positions == sorted(positions, reverse=True), "the longest work comes first"


def test_block_tables_lie_one_after_the_other() -> None:
    where = paged(MIXED)
    for s, first in zip(MIXED.decode, where.first_page.tolist(), strict=True):
        assert where.pages[first : first + len(s.block_table)].tolist() == s.block_table
    for s, span in zip(MIXED.prefill, where.spans, strict=True):
        assert (span.pages.tolist(), span.start, span.context) == (s.block_table, s.start, s.context)
        assert where.positions[span.rows].tolist() == list(range(s.start, s.context))


def test_every_field_is_aligned_for_wide_loads() -> None:
    """A Triton kernel is compiled anew for a pointer that is aligned otherwise."""
    for batch, rows in ((MIXED, None), (batch_of([3, 4, 5], []), None), (batch_of([3, 4, 5], []), 7)):
        packed = pack(batch, PAGE, 5, PAGES, rows)
        assert all(offset % 4 == 0 for offset in packed.offsets)


def test_a_cpu_has_plain_kernels_with_a_reason() -> None:
    choice = choose_kernels("cpu", "float32")
    assert choice.value == "plain" and "GPU" in choice.reason
