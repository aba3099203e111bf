"""What a GPU is told of a batch: every number worked out again, one token at a time."""

from __future__ import annotations

import random

import pytest
import torch

from splitwiser_lab.model.attention import AttentionInput
from splitwiser_lab.model.batch import GREEDY, PENDING, Batch, Sequence
from splitwiser_lab.model.choice import choose_kernels
from splitwiser_lab.model.paged import ITEM, QUERY_BLOCK, PagedInput, Shape, pack

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


def paged(batch: Batch, parts: int = 16, shape: Shape | None = None) -> PagedInput:
    packed = pack(batch, PAGE, parts, no_place=PAGES, shape=shape)
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
    assert where.ends.tolist() == [0, 1, 2, 3, 4 + 299, 4 + 300 + 20 + 127, 0], "the second prompt is not at its end"
    asked = [s for s in MIXED.sequences if s.sampling is not None]
    assert where.board.tolist() == [*(s.block_table[0] for s in asked), PAGES]


@pytest.mark.parametrize("parts", [1, 3, 16, 200])
@pytest.mark.parametrize("contexts", [[1], [1, 70, 2500, 9], [64] * 9, [1000, 1000], [16000]])
def test_parts_cover_every_context_once(contexts: list[int], parts: int) -> None:
    batch = batch_of(contexts, [])
    where = paged(batch, parts)
    items = [dict(zip(ITEM, numbers, strict=True)) for numbers in where.items.view(-1, len(ITEM)).tolist()]
    assert len(items) == len(contexts) + parts
    used = [item for item in items if item["row"] >= 0]
    for row, context in enumerate(contexts):
        mine = [item for item in used if item["row"] == row]
        assert sorted(t for item in mine for t in range(item["start"], item["end"])) == list(range(context))
        assert all(item["start"] < item["end"] and item["parts"] == len(mine) for item in mine)
        places = sorted(item["part"] for item in mine)
        assert places == list(range(mine[0]["first_part"], mine[0]["first_part"] + len(mine)))
        assert {item["context"] for item in mine} == {context}
        assert {where.pages[item["first_page"]].item() for item in mine} == {batch.decode[row].block_table[0]}
    assert len({item["part"] for item in used}) == len(used), "each has a place of its own in the scratch memory"
    lengths = [item["end"] - item["start"] for item in used]
    assert lengths == sorted(lengths, reverse=True), "the longest work comes first"
    assert max(lengths) <= max(-(-sum(contexts) // parts), 128) + 63


def test_padding_says_so_and_shifts_the_prompts() -> None:
    where = paged(batch_of([5, 70], []), 4, Shape(6))
    assert where.slots.tolist()[2:] == [-1] * 4
    assert where.board.tolist()[2:] == [PAGES] * 4
    assert (where.items.view(-1, len(ITEM))[:, 0] == -1).sum() == 10 - 2
    exact, padded = paged(MIXED), paged(MIXED, shape=Shape(7, 512, 4))
    rows = [0, 1, 2, 3, *range(7, 7 + 448)]
    for name in ("tokens", "positions", "slots"):
        assert getattr(padded, name)[rows].tolist() == getattr(exact, name).tolist()
        assert len(getattr(padded, name)) == 7 + 512
    assert (padded.slots == -1).sum() == 3 + 512 - 448
    assert padded.ends.tolist() == [0, 1, 2, 3, 0, 0, 0, 7 + 299, 7 + 300 + 20 + 127, 0, 0]
    assert padded.board[[0, 1, 2, 3, 7, 8, 9]].tolist() == exact.board.tolist()
    assert (padded.board == PAGES).sum() == 3 + 2
    assert [span.rows for span in padded.spans] == [span.rows for span in exact.spans], "counted from the first prompt"
    filled = padded.block_tokens > 0
    assert (padded.block_row[filled] - 3).tolist() == exact.block_row[exact.block_tokens > 0].tolist()


def test_an_empty_shape_can_hold_any_spread_of_its_tokens() -> None:
    """The number of query blocks is the graph's: prompts of one token each need the most."""
    shape = Shape(0, 512, 16)
    for spans in ([(0, 512)], [(0, 1)] * 15 + [(0, 497)], [(3, 32)] * 16, [(0, 129)] * 3):
        where = paged(batch_of([], spans), shape=shape)
        assert len(where.block_tokens) == shape.blocks
        assert where.block_tokens.sum() == sum(n for _, n in spans)


def test_query_blocks_cover_every_prompt_token() -> None:
    where = paged(MIXED)
    rows = {}
    numbers = (where.block_row, where.block_tokens, where.block_position, where.block_page)
    for row, count, position, page in zip(*(t.tolist() for t in numbers), strict=True):
        assert 0 <= count <= QUERY_BLOCK
        for i in range(count):
            rows[row + i] = (position + i, where.pages[page].item())
    expected, row = {}, len(MIXED.decode)
    for s in MIXED.prefill:
        for p in range(s.start, s.context):
            expected[row] = (p, s.block_table[0])
            row += 1
    assert rows == expected
    positions = where.block_position[where.block_tokens > 0].tolist()
    assert positions == sorted(positions, reverse=True), "the longest work comes first"


def test_block_tables_lie_one_after_the_other() -> None:
    where = paged(MIXED)
    assert where.pages.tolist() == [page for s in MIXED.sequences for page in s.block_table]
    for s, span in zip(MIXED.prefill, where.spans, strict=True):
        assert (span.pages.tolist(), span.start, span.context) == (s.block_table, s.start, s.context)
        assert where.positions[4:][span.rows].tolist() == list(range(s.start, s.context))


def test_every_field_is_aligned_for_wide_loads() -> None:
    """A Triton kernel is compiled anew for a pointer that is aligned otherwise."""
    for batch, shape in ((MIXED, None), (batch_of([3, 4, 5], []), None), (batch_of([3, 4, 5], []), Shape(7))):
        packed = pack(batch, PAGE, 5, PAGES, shape)
        assert all(offset % 4 == 0 for offset in packed.offsets)


def test_a_cpu_has_plain_kernels_with_a_reason() -> None:
    choice = choose_kernels("cpu", "float32")
    assert choice.value == "plain" and "GPU" in choice.reason
