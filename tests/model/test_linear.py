"""`linear` computes what `F.linear` computes, for every number of rows, whichever kernel it takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from splitwiser_lab.model.linear import linear
from splitwiser_lab.model.packed import gated, pack, packable, packing, view


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    packing.cache_clear()
    yield
    packing.cache_clear()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", range(41))
def test_equals_f_linear(rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 72, generator=generator), torch.randn(53, 72, generator=generator)
    bias = torch.randn(53, generator=generator) if biased else None
    with torch.inference_mode():
        ours = linear(x, weight, bias)
    assert ours.shape == (rows, 53)
    torch.testing.assert_close(ours, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_inputs_are_left_alone(rows: int) -> None:
    x, weight, bias = torch.randn(rows, 16), torch.randn(8, 16), torch.randn(8)
    before = [t.clone() for t in (x, weight, bias)]
    linear(x, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias), before, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_cut_out_of_a_larger_tensor(rows: int) -> None:
    """The rows of the last tokens are a view: not contiguous in memory."""
    x, weight = torch.randn(2 * rows, 32)[::2], torch.randn(24, 32)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_plain_weights_of_other_dtypes_are_f_linear_to_the_bit(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((3, 16), (8, 16), (8,)))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


needs_packing = pytest.mark.skipif(packing().value != "packed", reason=packing().reason)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33, 512])
def test_packed_weights_multiply_as_plain_ones(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, 96), (192, 96), (192,)))
    wanted = F.linear(x.double(), weight.double(), bias.double())
    packed = pack(weight)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(linear(x, packed, bias).double(), wanted, rtol=tolerance, atol=tolerance)


@needs_packing
def test_packed_memory_can_be_viewed_again() -> None:
    """As another process does, which maps the memory and has never seen the matrix."""
    x, weight = torch.randn(5, 64), torch.randn(128, 64)
    packed = pack(weight)
    assert torch.equal(linear(x, view(weight)), linear(x, packed))
    weight.zero_()  # both read this memory and no other
    assert linear(x, packed).abs().max() == 0


@needs_packing
def test_matrices_that_need_padding_are_not_packable() -> None:
    assert packable(torch.zeros(128, 64))
    assert not packable(torch.zeros(17, 33))
    assert not packable(torch.zeros(128, 64, dtype=torch.float64))


def test_a_pytorch_without_onednn_uses_f_linear(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    choice = packing()
    assert choice.value == "plain"
    assert "oneDNN" in choice.reason
    x, weight = torch.randn(6, 16), torch.randn(8, 16)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    class Wrong:
        @staticmethod
        def _linear_pointwise(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
            return F.linear(x, weight) + 0.1

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Wrong)
    assert packing().value == "plain"
    assert "something else" in packing().reason


def test_a_kernel_that_is_gone_is_not_used(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert packing().value == "plain"
    assert torch.__version__ in packing().reason


@needs_packing
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_gating_within_the_products(rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, both = torch.randn(rows, 64, generator=generator), torch.randn(256, 64, generator=generator)
    bias = torch.randn(256, generator=generator) if biased else None
    gate, up = F.linear(x, both, bias).chunk(2, dim=-1)
    memory = [half.clone() for half in both.chunk(2)]  # packed views do not keep it alive
    halves = [pack(half) for half in memory]
    torch.testing.assert_close(gated(x, *halves, bias), F.silu(gate) * up, rtol=1e-5, atol=1e-4)
