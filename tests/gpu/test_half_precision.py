"""Every mode on a real GPU in bfloat16, with matrices as wide as real ones: what differs is a near-tie, or refused.

In float32 other kernels run. A device that multiplies wrongly in half precision alone, as some shares of MPS do on an
H200, is not seen there.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import splitwiser_lab as sl
from splitwiser_lab.lanes.partition import grid_of
from splitwiser_lab.measure.reference import Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none"),
]

WIDTHS = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY, LAYERS, NEW = 32_000, 3, 24
LENGTHS = (1, 30, 129, 300, 511, 700, 1024, 1500)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "max_position_embeddings": 2048}
    config = LlamaConfig(**WIDTHS, **shape)
    with torch.device("cuda"):  # `.to(torch.bfloat16)` would round the rotary frequencies, too
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reference(model: LlamaForCausalLM) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[list[int]]:
    return [reference.tokens(prompt, NEW, ignore_eos=True) for prompt in prompts()]


@pytest.fixture(scope="module")
def engine(model: LlamaForCausalLM) -> Iterator[sl.Engine]:
    with sl.Engine.from_pretrained(model, dtype="bfloat16", device="cuda", kv_tokens=20_000) as engine:
        yield engine


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def check(engine: sl.Engine, reference: Reference, expected: list[list[int]]) -> None:
    """Twice: the first batches of a shape run kernel by kernel, later ones as graphs."""
    for _ in range(2):
        result = engine.generate(prompts(), NEW, ignore_eos=True)
        for prompt, ours, theirs in zip(prompts(), result.tokens, expected, strict=True):
            found = reference.check(prompt, ours, theirs)
            assert found.identical or found.explained, f"{len(prompt)} tokens in: {found}"


def choose(engine: sl.Engine, mode: str, **options: int) -> None:
    support = {found.mode: found for found in sl.supported_modes("cuda")}[mode]
    if not support.available:
        pytest.skip(f"{mode}: {support.reason}")
    engine.set_mode(mode, **options)


@pytest.mark.parametrize("mode", ["sequential", "chunked", "streams", "partitioned", "processes", "mps", "auto"])
def test_what_differs_from_transformers_is_a_near_tie(
    engine: sl.Engine, reference: Reference, expected: list[list[int]], mode: str
) -> None:
    choose(engine, mode)
    check(engine, reference, expected)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_split_of_the_sms_computes_right_or_is_refused(
    engine: sl.Engine, reference: Reference, expected: list[list[int]], part: int
) -> None:
    """In the smallest part that a driver gives, a matrix library may find no kernel that fits."""
    allowed = grid_of(0).allowed
    try:
        choose(engine, "partitioned", decode_sms=allowed[(0, len(allowed) // 2, -1)[part]])
    except sl.LaneError as error:
        assert "in a green context with" in str(error) and "Choose another share" in str(error)
        assert part != 1, "the middle must do"
        choose(engine, "sequential")  # the engine goes on
    check(engine, reference, expected)


@pytest.mark.parametrize("share", [20, 50, 75, 100])
def test_a_share_of_mps_computes_right_or_is_refused(
    engine: sl.Engine, reference: Reference, expected: list[list[int]], share: int
) -> None:
    """Which of them is a matter of the device, its driver and its matrix library."""
    try:
        choose(engine, "mps", prefill_share=share, decode_share=100)
    except sl.LaneError as error:
        assert f"with {share} % of the GPU" in str(error) and "come out wrong" in str(error)
        assert share < 100
        return
    check(engine, reference, expected)
