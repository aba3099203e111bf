"""Our transformer's logits are those of transformers, however the tokens are batched and paged."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, build, prompts_of, tiny
from transformers import PreTrainedModel

from splitwiser_lab.model.attention import AttentionInput, _gather, sdpa
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.loading import load
from splitwiser_lab.model.transformer import Transformer

PAGE = 8
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def transformer_of(model: PreTrainedModel, pages: int = 64, page_size: int = PAGE) -> Transformer:
    weights = load(model, "cpu", torch.float32).weights
    return Transformer(weights, KVPool(weights.config, torch.float32, "cpu", pages, page_size))


def reference(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of transformers for one sequence."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def tables(lengths: list[int], pages: int = 64, seed: int = 0) -> list[list[int]]:
    """A block table for each length, from one shuffled deck: neither contiguous nor in order."""
    deck = list(range(pages))
    random.Random(seed).shuffle(deck)
    return [[deck.pop() for _ in range(-(-length // PAGE))] for length in lengths]


def part(tokens: list[int], start: int, end: int, table: list[int]) -> Sequence:
    return Sequence(tokens[start:end], start, table, GREEDY)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 1, "flat logits would agree by accident"
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_alone(name: str) -> None:
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, 37]
    prompts, where = prompts_of(*lengths), tables(lengths)
    batch = Batch([], [part(p, 0, len(p), t) for p, t in zip(prompts, where, strict=True)])
    ours = transformer_of(tiny(name)).logits(batch, list(range(sum(lengths))))
    close(ours, torch.cat([reference(tiny(name), prompt) for prompt in prompts]))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prefill_in_chunks(name: str, chunk: int) -> None:
    (prompt,), (where,) = prompts_of(41), tables([41])
    model = transformer_of(tiny(name))
    ours = []
    for start in range(0, len(prompt), chunk):
        piece = part(prompt, start, min(start + chunk, len(prompt)), where)
        ours.append(model.logits(Batch([], [piece]), list(range(len(piece.tokens)))))
    close(torch.cat(ours), reference(tiny(name), prompt))


@pytest.mark.parametrize("name", VARIANTS)
def test_ragged_decode_and_mixed_batches(name: str) -> None:
    lengths = [4, PAGE, 2 * PAGE + 1, 45]
    prompts, where = prompts_of(*lengths, 30), tables([length + 4 for length in lengths] + [30])
    newcomer, newcomer_table = prompts.pop(), where.pop()
    model = transformer_of(tiny(name))
    everyone = list(zip(prompts, where, strict=True))
    model.run(Batch([], [part(p, 0, len(p) - 3, t) for p, t in everyone]))

    def decode(back: int) -> list[Sequence]:
        return [part(p, len(p) - back, len(p) - back + 1, t) for p, t in everyone]

    theirs = [reference(tiny(name), prompt) for prompt in prompts]
    for back in (3, 2):
        close(model.logits(Batch(decode(back), []), [0, 1, 2, 3]), torch.stack([t[-back] for t in theirs]))
    # The newcomer's second chunk rides along with everyone's last token.
    model.run(Batch([], [part(newcomer, 0, 11, newcomer_table)]))
    mixed = Batch(decode(1), [part(newcomer, 11, 30, newcomer_table)])
    ours = model.logits(mixed, [0, 1, 2, 3, 22])
    close(ours, torch.stack([t[-1] for t in theirs] + [reference(tiny(name), newcomer)[-1]]))


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2}],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rope_scaling(scaling: dict[str, Any]) -> None:
    scaling = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, **scaling}
    model, plain = build("llama", rope_parameters=scaling), tiny("llama")
    (prompt,), (where,) = prompts_of(100), tables([100])
    theirs = reference(model, prompt)
    assert (theirs - reference(plain, prompt)).abs().max() > 0.1, "this scaling is without effect here"
    ours = transformer_of(model).logits(Batch([], [part(prompt, 0, 100, where)]), list(range(100)))
    close(ours, theirs)


def test_a_batch_writes_only_the_pages_of_its_sequences() -> None:
    model = transformer_of(tiny("llama"))
    prompts, where = prompts_of(20, 9), tables([20, 9])
    before = model.pool.data.clone()
    model.run(Batch([], [part(p, 0, len(p), t) for p, t in zip(prompts, where, strict=True)]))
    touched = (model.pool.data != before).flatten(3).any(-1).any(0).any(0).nonzero()[:, 0].tolist()
    assert sorted(touched) == sorted(where[0] + where[1])
    last_page = model.pool.data[:, :, where[1][1]]  # [layers, 2, page_size, H_kv, D], one token in it
    assert last_page[:, :, 0].abs().min() > 0
    assert last_page[:, :, 1:].abs().max() == 0


@pytest.mark.parametrize("left", [3.0, -1e30, float("inf"), float("nan")])
def test_what_former_owners_left_in_the_pages_has_no_effect(left: float) -> None:
    """In float16 a request may overflow; those that get its pages later must not suffer for it."""
    prompts, where = prompts_of(20, 45), tables([21, 46])
    model = transformer_of(tiny("llama"))
    model.pool.data.fill_(left)
    everyone = list(zip(prompts, where, strict=True))
    model.run(Batch([], [part(p, 0, len(p) - 1, t) for p, t in everyone]))
    ours = model.logits(Batch([part(p, len(p) - 1, len(p), t) for p, t in everyone], []), [0, 1])
    close(ours, torch.stack([reference(tiny("llama"), prompt)[-1] for prompt in prompts]))


def test_neighbours_in_a_batch_do_not_change_a_sequence() -> None:
    prompts, where = prompts_of(20, 33, 6), tables([20, 33, 6])
    alone = transformer_of(tiny("qwen3")).logits(Batch([], [part(prompts[1], 0, 33, where[1])]), [32])
    batch = Batch([], [part(p, 0, len(p), t) for p, t in zip(prompts, where, strict=True)])
    together = transformer_of(tiny("qwen3")).logits(batch, [52])
    torch.testing.assert_close(together, alone, rtol=0.0, atol=1e-5)


def test_no_token_is_picked_for_a_prompt_that_is_not_at_its_end() -> None:
    model = transformer_of(tiny("llama"))
    prompts, where = prompts_of(20, 5), tables([20, 5])
    unfinished = Sequence(prompts[0][:9], 0, where[0], None)
    assert model.run(Batch([], [unfinished])).tolist() == []
    both = Batch([], [Sequence(prompts[0][9:15], 9, where[0], None), part(prompts[1], 0, 5, where[1])])
    assert model.run(both).tolist() == [int(reference(tiny("llama"), prompts[1])[-1].argmax())]


@torch.inference_mode()
def test_sdpa_equals_attention_written_out() -> None:
    """The reference that faster kernels must equal, against softmax(q k / sqrt(d)) v, one head at a time."""
    torch.manual_seed(0)
    heads, kv_heads, dim = 6, 2, 8
    keys, values = torch.randn(16, PAGE, kv_heads, dim), torch.randn(16, PAGE, kv_heads, dim)
    decode = [Sequence([0], context - 1, [], GREEDY) for context in (1, 11, 24)]
    prefill = [Sequence([0] * 5, 0, [], None), Sequence([0] * 6, 13, [], GREEDY)]
    where = tables([s.context for s in decode + prefill], pages=16)
    placed = [Sequence(s.tokens, s.start, t, s.sampling) for s, t in zip(decode + prefill, where, strict=True)]
    batch = Batch(placed[:3], placed[3:])
    q = torch.randn(3 + 5 + 6, heads, dim)
    ours = sdpa(q, keys, values, AttentionInput.of(batch, PAGE, "cpu", torch.float32))
    row = 0
    for sequence in batch.sequences:
        k, v = (pages[sequence.block_table].reshape(-1, kv_heads, dim) for pages in (keys, values))
        for position in range(sequence.start, sequence.context):
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = k[: position + 1, group] @ q[row, head] / dim**0.5
                expected = scores.softmax(0) @ v[: position + 1, group]
                torch.testing.assert_close(ours[row, head], expected, rtol=1e-5, atol=1e-6)
            row += 1


@torch.inference_mode()
def test_gathered_keys_and_values_lie_in_different_memory() -> None:
    """They are read together: one workspace for both would overwrite the keys."""
    pages = torch.randn(8, PAGE, 2, 4)
    keys, values = _gather(pages, torch.tensor([1, 2]), 0), _gather(pages, torch.tensor([5, 6]), 1)
    assert torch.equal(keys, pages[[1, 2]].flatten(0, 1))
    assert torch.equal(values, pages[[5, 6]].flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    """No exactness is promised there: only that the dtype runs, and rounds rather than errs."""
    weights = load(tiny("llama"), "cpu", dtype).weights
    model = Transformer(weights, KVPool(weights.config, dtype, "cpu", 64, PAGE))
    (prompt,), (where,) = prompts_of(30), tables([31])
    theirs = reference(tiny("llama"), prompt)
    model.run(Batch([], [part(prompt, 0, 29, where)]))
    ours = model.logits(Batch([part(prompt, 29, 30, where)], []), [0])[0]
    assert ours.dtype == torch.float32
    assert torch.corrcoef(torch.stack([ours, theirs[-1]]))[0, 1] > 0.99
