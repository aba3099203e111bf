"""The fast kernels against the plain ones, and the decode graphs against the plain transformer, on a real GPU."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from splitwiser_lab.model.attention import AttentionInput
from splitwiser_lab.model.batch import GREEDY, PENDING, Batch, SamplingSpec, Sequence
from splitwiser_lab.model.choice import choose_kernels, kernel_error
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.kernels import PlainKernels
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.paged import PagedInput, pack
from splitwiser_lab.model.transformer import Transformer
from splitwiser_lab.model.weights import Weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none"),
]

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BATCHES = {
    "ragged decode": ([1, 50, 1300, 17, 4000], []),
    "one long context": ([9000], []),
    "prefill": ([], [(0, 700), (129, 300), (5, 1), (0, 1)]),
    "mixed": ([33, 640], [(0, 400), (37, 20)]),
}


def config(heads: int = 8, kv_heads: int = 2, head_dim: int = 64) -> ModelConfig:
    shape: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 5003}
    return ModelConfig.from_hf(
        LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    )


def tables(lengths: list[int], page_size: int, pages: int) -> list[list[int]]:
    deck = list(range(pages))
    random.Random(0).shuffle(deck)
    return [[deck.pop() for _ in range(-(-length // page_size))] for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2, 64), (4, 1, 128), (6, 2, 24), (3, 3, 80)], ids=str)
@pytest.mark.parametrize(
    ("page_size", "batch"), [(16, "ragged decode"), (32, "one long context"), (8, "prefill"), (32, "mixed")]
)
def test_attention_over_pages(dtype: torch.dtype, shape: tuple[int, int, int], page_size: int, batch: str) -> None:
    from splitwiser_lab.model.triton_kernels import TritonKernels

    contexts, spans = BATCHES[batch]
    where = tables([*contexts, *(s + n for s, n in spans)], page_size, 1000)
    decode = [Sequence([0], c - 1, t, GREEDY) for c, t in zip(contexts, where, strict=False)]
    prefill = [Sequence([0] * n, s, t, GREEDY) for (s, n), t in zip(spans, where[len(contexts) :], strict=True)]
    mixed = Batch(decode, prefill)
    _, kv_heads, dim = shape
    capability = torch.cuda.get_device_capability()
    fast = TritonKernels(config(*shape), "cuda", dtype, page_size, capability)
    plain = PlainKernels(config(*shape), "cuda", torch.float32)
    packed = pack(mixed, page_size, 24, 1000)
    paged = PagedInput.views(torch.from_numpy(packed.numbers).cuda(), packed)
    simple = AttentionInput.of(mixed, page_size, "cuda", torch.float32)
    for _ in range(2):  # the second time over scratch memory that was used
        pool = torch.randn(2, 1000, page_size, kv_heads, dim, device="cuda").to(dtype)
        expected_pool = pool.float()
        qk, v = (
            torch.randn(len(paged.tokens), sum(shape[:2]) + kv_heads, dim, device="cuda")
            .to(dtype)
            .split([sum(shape[:2]), kv_heads], dim=1)
        )
        theirs = plain.attend(qk.float(), v.float(), plain.rotation(paged.positions), tuple(expected_pool), simple)
        ours = fast.attend(qk, v, fast.rotation(paged.positions), tuple(pool), paged).float()
        assert (ours - theirs).norm() / theirs.norm() < DTYPES[dtype]
        stored, expected = (each.flatten(1, 2)[:, paged.slots] for each in (pool.float(), expected_pool))
        assert (stored - expected).norm() / expected.norm() < DTYPES[dtype]


def model(dtype: torch.dtype) -> Transformer:
    weights = Weights(config(), dtype, "cuda").fill_random(1)
    return Transformer(weights, KVPool(weights.config, dtype, "cuda", 400, 16))


def decode_batch(lengths: list[int], tokens: list[int], spec: SamplingSpec = GREEDY) -> Batch:
    where = tables([length + 8 for length in lengths], 16, 400)
    return Batch([Sequence([t], n, p[: n // 16 + 1], spec) for t, n, p in zip(tokens, lengths, where, strict=True)], [])


def prefill_batch(lengths: list[int]) -> Batch:
    where, draw = tables([length + 8 for length in lengths], 16, 400), random.Random(3)
    return Batch(
        [],
        [
            Sequence([draw.randrange(5003) for _ in range(n)], 0, t[: -(-n // 16)], GREEDY)
            for n, t in zip(lengths, where, strict=True)
        ],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_graphs_pick_the_tokens_of_the_plain_transformer(dtype: torch.dtype) -> None:
    """Prefill, then steps whose tokens never leave the device; batches of other sizes replay other graphs."""
    from splitwiser_lab.model.runner import GraphRunner

    lengths = [5, 130, 16, 77, 300]
    plain, fast = model(dtype), model(dtype)
    with torch.cuda.stream(torch.cuda.Stream()):
        runner = GraphRunner(fast)
        expected = plain.run(prefill_batch(lengths)).tolist()
        assert runner.run(prefill_batch(lengths)).tolist() == expected
        for step in range(3):
            now = [n + step for n in lengths]
            expected = plain.run(decode_batch(now, expected)).tolist()
            picked = runner.run(decode_batch(now, [PENDING] * len(now)))
            assert picked.tolist() == expected
        few = decode_batch([n + 3 for n in lengths], expected).decode[1:3]
        assert runner.run(Batch(few, [])).tolist() == plain.run(Batch(few, [])).tolist()
        torch.cuda.current_stream().synchronize()
    close = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert (plain.pool.data - fast.pool.data).abs().max() < close, "padding wrote to nobody's page"


@torch.inference_mode()
def test_prompts_and_mixed_batches_replay_graphs_too() -> None:
    """Other prompts of another spread, that are padded to the same shape, beside sequences that decode."""
    from splitwiser_lab.model.runner import GraphRunner

    plain, fast = model(torch.bfloat16), model(torch.bfloat16)
    where, draw = tables([100] * 10, 16, 400), random.Random(4)

    def part(i: int, start: int, count: int) -> Sequence:
        return Sequence(
            [draw.randrange(5003) for _ in range(count)], start, where[i][: -(-(start + count) // 16)], GREEDY
        )

    prompts = [
        Batch([], [part(0, 0, 60), part(1, 0, 33)]),
        Batch([], [part(2, 0, 5), part(3, 0, 90)]),
        Batch([], [part(4, 0, 70), part(5, 0, 40)]),
    ]
    mixed = [
        Batch([part(0, 60, 1), part(1, 33, 1), part(2, 5, 1)], [part(6, 0, 50)]),
        Batch([part(0, 61, 1), part(3, 90, 1), part(4, 70, 1)], [part(6, 50, 30)]),
        Batch([part(1, 34, 1), part(2, 6, 1), part(5, 40, 1)], [part(7, 0, 64)]),
    ]
    with torch.cuda.stream(torch.cuda.Stream()):
        runner = GraphRunner(fast)
        for batch in prompts + mixed:
            picked = runner.run(batch)
            ends = [end - 1 for end in accumulate(len(s.tokens) for s in batch.sequences)]
            logits = plain.logits(batch, ends)
            # In bfloat16 the best two may be as good as equal.
            assert (logits.amax(-1) - logits.gather(1, picked.long()[:, None])[:, 0]).max() < 0.02
            assert logits.std() > 0.1
        assert len(runner._steps) == 2 and len(runner._seen) == 2
        torch.cuda.current_stream().synchronize()
    assert (plain.pool.data.float() - fast.pool.data.float()).abs().max() < 5e-2


@torch.inference_mode()
def test_after_a_warm_up_the_first_batch_is_a_graph_and_right() -> None:
    from splitwiser_lab.model.graph_shapes import UsualWork
    from splitwiser_lab.model.runner import GraphRunner

    lengths = [5, 130, 16]
    plain, fast = model(torch.float16), model(torch.float16)
    with torch.cuda.stream(torch.cuda.Stream()):
        runner = GraphRunner(fast)
        runner.warm_up(UsualWork(rows=4, prefill_tokens=192, mixed_tokens=64))
        made = set(runner._steps)
        assert not fast.pool.data.any(), "padding wrote to the pool"
        batch = prefill_batch(lengths)
        for _ in range(2):  # prompts, then a step
            picked = runner.run(batch)
            ends = [end - 1 for end in accumulate(len(s.tokens) for s in batch.sequences)]
            logits = plain.logits(batch, ends)
            # In float16 the best two may be as good as equal.
            assert (logits.amax(-1) - logits.gather(1, picked.long()[:, None])[:, 0]).max() < 0.02
            batch = decode_batch(lengths, picked.tolist())
        assert set(runner._steps) == made and not runner._seen
        runner.warm_up(UsualWork(rows=4, prefill_tokens=192))
        assert set(runner._steps) == made, "made once"


@torch.inference_mode()
def test_a_capture_waits_for_nothing_on_its_stream() -> None:
    """A graph is captured behind a batch that still runs: the host goes on at once, and the tokens are right."""
    from splitwiser_lab.model.runner import GraphRunner

    lengths = [5, 130, 16]
    plain, fast = model(torch.float32), model(torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        runner = GraphRunner(fast)
        expected = plain.run(prefill_batch(lengths)).tolist()
        runner.run(prefill_batch(lengths))
        steps = [decode_batch([n + step for n in lengths], [PENDING] * 3) for step in range(3)]
        runner.run(steps[0])  # kernel by kernel
        torch.cuda._sleep(2_000_000_000)  # about a second
        captured = runner.run(steps[1])
        replayed = runner.run(steps[2])
        assert not stream.query(), "the host waited for the stream"
        for step in range(3):
            expected = plain.run(decode_batch([n + step for n in lengths], expected)).tolist()
    assert len(runner._steps) == 1 and replayed.tolist() == expected
    assert captured.data_ptr() == replayed.data_ptr(), "the same graph wrote both"


@torch.inference_mode()
def test_sampled_tokens_are_those_of_the_plain_transformer() -> None:
    from splitwiser_lab.model.runner import GraphRunner

    lengths, spec = [38, 9, 100], SamplingSpec(1.0, 0.9, 0.37)
    plain, fast = model(torch.float32), model(torch.float32)
    with torch.cuda.stream(torch.cuda.Stream()):
        runner = GraphRunner(fast)
        first = plain.run(prefill_batch(lengths)).tolist()
        runner.run(prefill_batch(lengths))
        batch = decode_batch(lengths, first, spec)
        mixed = Batch(
            [batch.decode[0], Sequence([first[1]], 9, batch.decode[1].block_table, GREEDY), batch.decode[2]], []
        )
        expected = plain.run(mixed).tolist()
        assert runner.run(mixed).tolist() == expected
        after = [n + 1 for n in lengths]
        assert (
            runner.run(decode_batch(after, [PENDING] * 3)).tolist() == plain.run(decode_batch(after, expected)).tolist()
        )


def test_the_choice_is_tried_and_told() -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        choice = choose_kernels("cuda", dtype)
        assert choice.value in ("triton", "plain") and choice.reason
    if torch.cuda.get_device_capability() >= (8, 0):
        assert choose_kernels("cuda", "bfloat16").value == "triton"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_plain_sums_for_gpus_without_matrix_units(dtype: str) -> None:
    """What a T4 (sm_75) runs, on this GPU."""
    assert kernel_error("cuda", dtype, (7, 5)) < 2e-3


def test_llama_of_transformers_is_matched_in_float32() -> None:
    """Logits through the fast kernels, against transformers' own."""
    from splitwiser_lab.model.loading import load
    from splitwiser_lab.model.runner import GraphRunner

    torch.manual_seed(0)
    hf = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=199,
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=96,
                initializer_range=0.3,
            )
        )
        .cuda()
        .eval()
    )
    weights = load(hf, "cuda", torch.float32).weights
    prompt = torch.randint(5, 199, (90,)).tolist()
    with torch.cuda.stream(torch.cuda.Stream()):
        runner = GraphRunner(Transformer(weights, KVPool(weights.config, torch.float32, "cuda", 64, 16)))
        with torch.inference_mode():
            expected = hf(torch.tensor([prompt], device="cuda")).logits[0].argmax(-1).tolist()
        picked = [int(runner.run(Batch([], [Sequence(prompt[:60], 0, list(range(4)), GREEDY)])))]
        for position in range(60, 90):
            batch = Batch([Sequence([prompt[position]], position, list(range(position // 16 + 1)), GREEDY)], [])
            picked.append(int(runner.run(batch)))
    assert picked == expected[59:]
