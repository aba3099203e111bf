"""On a real GPU: the modes that run there, token by token against transformers."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

import splitwiser_lab as sl
from splitwiser_lab.lanes.partition import grid_of
from splitwiser_lab.measure.reference import Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none"),
]

SHARED = {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 512}
LLAMA = {**SHARED, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA, initializer_range=0.3)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**LLAMA, head_dim=24, initializer_range=0.3)),
    "opt": (
        OPTForCausalLM,
        OPTConfig(**SHARED, num_attention_heads=4, ffn_dim=96, word_embed_proj_dim=64, init_std=0.3),
    ),
}
MODES = ["sequential", "chunked"]


def model(family: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, config = MODELS[family]
    return kind(config).to("cuda", dtype).eval()


def prompts(count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 90, (count,), generator=generator).tolist()
    return [torch.randint(5, 199, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_float32_tokens_are_those_of_transformers(family: str, mode: str) -> None:
    hf = model(family, torch.float32)
    expected = [Reference(hf).tokens(p, 24, ignore_eos=True) for p in prompts()]
    assert len({t for row in expected for t in row}) > 20
    with sl.Engine.from_pretrained(hf, dtype="float32", device="cuda", mode=mode, kv_tokens=4096) as engine:
        engine.set_mode(mode, **({"chunk_tokens": 24} if mode == "chunked" else {}))
        result = engine.generate(prompts(), 24, ignore_eos=True)
    assert result.tokens == expected
    spans = sorted(result.timeline.spans, key=lambda span: span.start)
    assert all(a.end <= b.start + 1e-4 for a, b in pairwise(spans)), "one lane, one batch at a time"
    assert sum(span.prefill_tokens for span in spans) == sum(map(len, prompts()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_differences_are_explained_by_the_logit_gap(dtype: str) -> None:
    hf = model("llama", getattr(torch, dtype))
    judge = Reference(hf)
    with sl.Engine.from_pretrained(hf, dtype=dtype, device="cuda", kv_tokens=4096) as engine:
        tokens = engine.generate(prompts(), 24, ignore_eos=True).tokens
    checks = [judge.check(p, ours, judge.tokens(p, 24, True)) for p, ours in zip(prompts(), tokens, strict=True)]
    said = [str(check) for check in checks]
    print(said)
    assert all(check.explained for check in checks), said


def test_flips_and_preemption_change_no_token() -> None:
    hf = model("llama", torch.float32)
    expected = [Reference(hf).tokens(p, 40, ignore_eos=True) for p in prompts()]
    flips = iter([mode for _ in range(10) for mode in MODES])
    with sl.Engine.from_pretrained(hf, dtype="float32", device="cuda", kv_tokens=512, page_size=16) as engine:
        result = engine.generate(
            prompts(), 40, ignore_eos=True, on_token=lambda r, t: engine.set_mode(next(flips, "sequential"))
        )
    assert result.tokens == expected
    assert sum(record.preemptions for record in result.timeline.requests) > 0
    assert {span.mode for span in result.timeline.spans} == set(MODES)


def test_lanes_start_in_another_thread_while_graphs_are_captured() -> None:
    """Each new share of the SMs has lanes of its own, which start while the old ones capture theirs."""
    hf = model("llama", torch.float32)
    expected = [Reference(hf).tokens(p, 40, ignore_eos=True) for p in prompts()]
    failed: list[BaseException] = []

    def flip(engine: sl.Engine) -> None:
        try:
            for sms in grid_of(0).allowed:
                engine.set_mode("partitioned", decode_sms=sms)
                time.sleep(0.01)
                engine.set_mode("streams")
                time.sleep(0.01)
        except BaseException as error:
            failed.append(error)

    with sl.Engine.from_pretrained(hf, dtype="float32", device="cuda", kv_tokens=4096) as engine:
        thread = threading.Thread(target=flip, args=(engine,))
        thread.start()
        while thread.is_alive():
            assert engine.generate(prompts(), 40, ignore_eos=True).tokens == expected
        thread.join()
        assert not failed
        assert len(engine.timeline().modes) > 5


def test_close_gives_the_memory_back() -> None:
    # The first engine leaves the matrix library's workspace, which belongs to the stream and is used by the next one.
    sl.Engine.from_pretrained(model("llama", torch.float32), device="cuda", kv_tokens=1000).close()
    before = torch.cuda.memory_allocated()
    engine = sl.Engine.from_pretrained(model("llama", torch.float32), device="cuda", kv_tokens=100_000)
    assert torch.cuda.memory_allocated() > before
    engine.close()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_doctor_names_every_mode_with_a_reason() -> None:
    found = sl.doctor("cuda")
    assert found.dtype.value in ("bfloat16", "float16")
    assert {mode.mode: mode.available for mode in found.modes}["sequential"]
    assert all(mode.reason for mode in found.modes)
