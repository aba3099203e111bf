"""Run by test_triton_interpreted.py in a process of its own, with TRITON_INTERPRET=1: prints what it found as JSON."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from typing import Any

import torch
from transformers import LlamaConfig
from triton.runtime import interpreter

from splitwiser_lab.model.batch import GREEDY, NOT_A_NUMBER, PENDING, Batch, Sequence
from splitwiser_lab.model.choice import kernel_error
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.paged import PagedInput, Shape, pack
from splitwiser_lab.model.transformer import Transformer
from splitwiser_lab.model.triton_kernels import TritonKernels
from splitwiser_lab.model.weights import Weights

PAGE, PAGES = 16, 120
HOPPER, TURING = (9, 0), (7, 5)


def take_masks_as_they_are() -> None:
    """The interpreter makes numbers of a block of booleans and a single one, and then refuses them as a mask."""
    builder = interpreter.InterpreterBuilder
    for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
        untouched = getattr(builder, name)

        def call(self: Any, *args: Any, real: Any = untouched, at: int = at) -> Any:
            mask = interpreter.TensorHandle(args[at].data.astype(bool), interpreter.tl.int1)
            return real(self, *args[:at], mask, *args[at + 1 :])

        setattr(builder, name, call)


def transformer() -> Transformer:
    shape = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 5003}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24}
    weights = Weights(ModelConfig.from_hf(LlamaConfig(**shape, **heads)), torch.float32, "cpu").fill_random(1)
    return Transformer(weights, KVPool(weights.config, torch.float32, "cpu", PAGES, PAGE))


def batches() -> list[Batch]:
    """Prompts, a step over some of them, and one with both, in which the board keeps what was picked."""
    draw, deck = random.Random(0), list(range(PAGES))
    draw.shuffle(deck)
    lengths = [5, 50, 130, 16, 33]
    tables = [[deck.pop() for _ in range(-(-(length + 4) // PAGE))] for length in lengths]

    def prompt(i: int) -> Sequence:
        return Sequence([draw.randrange(5003) for _ in range(lengths[i])], 0, tables[i], GREEDY)

    def step(i: int, ahead: int) -> Sequence:
        return Sequence([PENDING], lengths[i] + ahead, tables[i], GREEDY)

    return [
        Batch([], [prompt(i) for i in range(4)]),
        Batch([step(i, 0) for i in range(4)], []),
        Batch([step(i, 1) for i in (2, 0)], [prompt(4)]),
    ]


@torch.inference_mode()
def whole_model() -> dict[str, Any]:
    """Every kernel in a forward pass of padded batches, against the plain transformer."""
    plain, fast = transformer(), transformer()
    kernels = TritonKernels(fast.config, "cpu", torch.float32, PAGE, TURING)
    board = torch.zeros(PAGES + 1, dtype=torch.int32)
    named: dict[int, int] = {}  # by first page: the token that the plain one picked
    equal, worst = [], 0.0
    for batch in batches():
        shape = Shape.of(batch)
        padded = Shape(4 if shape.rows else 0, -(-shape.tokens // 64) * 64, shape.prompts)
        packed = pack(batch, PAGE, 6, PAGES, padded)
        where = PagedInput.views(torch.from_numpy(packed.numbers), packed)
        tokens = kernels.resolve(where.tokens, board)
        logits = fast.forward(tokens, where.positions, where, where.ends if shape.prompts else None, kernels)
        picked = kernels.pick(logits, where.board, board)
        decode = [Sequence([named[s.block_table[0]]], s.start, s.block_table, GREEDY) for s in batch.decode]
        known = Batch(decode, batch.prefill)
        ends = [end - 1 for end in accumulate(len(s.tokens) for s in known.sequences)]
        expected = plain.logits(known, ends)
        rows = [*range(shape.rows), *range(padded.rows, padded.rows + shape.prompts)]
        worst = max(worst, float((logits[rows] - expected).norm() / expected.norm()))
        equal.append(picked[rows].tolist() == expected.argmax(-1).tolist())
        named |= {s.block_table[0]: t for s, t in zip(known.sequences, expected.argmax(-1).tolist(), strict=True)}
    pools = (plain.pool.data - fast.pool.data).abs().max()
    before = fast.pool.data.clone()
    packed = pack(Batch([], []), PAGE, 6, PAGES, Shape(4, 64, 4))  # a warm-up's: padding alone
    where = PagedInput.views(torch.from_numpy(packed.numbers), packed)
    logits = fast.forward(kernels.resolve(where.tokens, board), where.positions, where, where.ends, kernels)
    kernels.pick(logits, where.board, board)
    kept = torch.equal(before, fast.pool.data)
    return {"logits": worst, "tokens": equal, "pool": float(pools), "padding_writes_nothing": kept}


def not_a_number() -> dict[str, Any]:
    """Rows with a NaN in the first or the last of several blocks, beside one whose largest is infinite."""
    kernels = TritonKernels(transformer().config, "cpu", torch.float32, PAGE, TURING)
    logits = torch.randn(4, 9000)
    logits[0, 3] = logits[1, 8999] = float("nan")
    logits[1, 17] = logits[2, 8200] = float("inf")
    board = torch.zeros(5, dtype=torch.int32)
    picked = kernels.pick(logits, torch.arange(4, dtype=torch.int32), board)
    said = torch.tensor([7, -1, -2, -3, -4], dtype=torch.int32)  # a known token, then what lies on the board
    expected = [NOT_A_NUMBER, NOT_A_NUMBER, 8200, int(logits[3].argmax())]
    return {
        "picked": picked.tolist() == expected and board[:4].tolist() == expected,
        "resolved": kernels.resolve(said, board).tolist() == [7, 0, 0, *expected[2:]],
    }


def main() -> None:
    take_masks_as_they_are()
    torch.manual_seed(0)
    attention = {
        f"{dtype}, sm_{major}{minor}": kernel_error("cpu", dtype, (major, minor))
        for dtype, (major, minor) in (("float32", HOPPER), ("float16", HOPPER), ("float16", TURING))
    }
    print(json.dumps({"attention": attention, "model": whole_model(), "nan": not_a_number()}))


if __name__ == "__main__":
    main()
