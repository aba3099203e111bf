"""Which shapes batches are padded to, and that usual batches find theirs made beforehand."""

from __future__ import annotations

import pytest
import torch

from splitwiser_lab.model.batch import Batch
from splitwiser_lab.model.graph_shapes import MIXED_ROWS, MOST_TOKENS, UsualWork, padded
from splitwiser_lab.model.paged import ITEM, PagedInput, Shape, pack


def test_padding_never_shrinks_a_batch_and_settles_at_once() -> None:
    for shape in (
        Shape(rows, tokens, prompts)
        for rows in (0, 1, 37, 300)
        for tokens in (0, 1, 700, 5000)
        for prompts in (1, 3, 9)
    ):
        if not shape.tokens:
            shape = Shape(shape.rows)
        large = padded(shape)
        assert large.rows >= shape.rows and large.tokens >= shape.tokens and large.prompts >= shape.prompts
        assert padded(large) == large
        assert bool(large.rows) == bool(shape.rows) and bool(large.prompts) == bool(shape.prompts)


def test_every_usual_batch_finds_its_shape_made() -> None:
    made = set(UsualWork(rows=256, prefill_tokens=8192, mixed_tokens=512).shapes())
    assert {padded(Shape(rows)) for rows in range(1, 257)} <= made
    assert {padded(Shape(0, tokens, prompts)) for tokens in range(4, 4097) for prompts in (1, 2, 4)} <= made
    for rows in range(1, 257):
        room = 512 - -(-rows // MIXED_ROWS) * MIXED_ROWS  # what the scheduler leaves for prompts
        assert {padded(Shape(rows, tokens, prompts)) for tokens in range(2, room + 1) for prompts in (1, 2)} <= made
    assert len(made) < 100, "each costs some tens of milliseconds and some memory"


def test_a_full_mixed_batch_is_padded_to_its_budget_and_no_further() -> None:
    for rows in (1, 18, 32, 100, 200):
        taken = padded(Shape(rows, 64, 1)).rows
        full = padded(Shape(rows, 512 - taken, 1))
        assert full.rows + full.tokens == 512 and full.rows < rows + MIXED_ROWS


def test_what_a_lane_is_not_given_is_not_made() -> None:
    assert UsualWork().shapes() == []
    assert all(not shape.tokens for shape in UsualWork(rows=20).shapes()) and len(UsualWork(rows=20).shapes()) == 6
    assert all(not shape.rows for shape in UsualWork(prefill_tokens=300).shapes())
    assert max(shape.tokens for shape in UsualWork(prefill_tokens=300).shapes()) == 320
    assert UsualWork(rows=0, mixed_tokens=MOST_TOKENS + 1).shapes() == []


@pytest.mark.parametrize("shape", UsualWork(rows=64, prefill_tokens=600, mixed_tokens=256).shapes(), ids=str)
def test_a_batch_of_padding_alone_writes_nothing(shape: Shape) -> None:
    packed = pack(Batch([], []), 16, 7, 100, shape)
    where = PagedInput.views(torch.from_numpy(packed.numbers), packed)
    assert len(where.tokens) == shape.rows + shape.tokens and len(where.ends) == shape.rows + shape.prompts
    assert set(where.slots.tolist()) == {-1} and set(where.board.tolist()) == {100}
    assert all(row == -1 for row in where.items.reshape(-1, len(ITEM))[:, 0].tolist())
    assert not where.block_tokens.any() and len(where.block_row) == (shape.blocks if shape.prompts else 0)
