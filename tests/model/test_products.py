"""A device that multiplies wrongly is found out, by products with the model's own weights."""

from __future__ import annotations

import pytest
import torch

from splitwiser_lab.errors import HardwareError
from splitwiser_lab.model import products
from splitwiser_lab.model.products import ROWS, check_products


def matrices(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (96, 64), (64, 96), (96, 64), (4100, 64)  # the last: more columns than are compared at once
    return [(torch.randn(shape) * 10**i).to(dtype) for i, shape in enumerate(shapes, -3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_error(dtype: torch.dtype) -> None:
    check_products([*matrices(dtype), torch.zeros(8, 64, dtype=dtype)], "here", "Nothing to do.")


@pytest.mark.parametrize("spoil", [float("nan"), 0.0, 3.0, float("inf")])
def test_one_wrong_number_of_one_product_is_seen(monkeypatch: pytest.MonkeyPatch, spoil: float) -> None:
    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        product = x @ weight.T
        if x.shape == (100, 96):
            product[7, 11] = product[7, 11] * spoil if spoil in (0.0, 3.0) else spoil
        return product

    monkeypatch.setattr(products, "linear", linear)
    with pytest.raises(
        HardwareError, match=r"with 98 SMs, 1 of 51 bfloat16.*e\.g\. \[100, 96\] x \[96, 64\]\).*Try 50"
    ):
        check_products(matrices(), "with 98 SMs", "Try 50 %.")


def test_products_that_no_batch_asks_for_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return x @ weight.T

    monkeypatch.setattr(products, "linear", linear)
    monkeypatch.setattr(products, "_MOST_ELEMENTS", 96 * 300)
    check_products([torch.ones(96, 8)], "here", "")
    assert asked == [count for count in ROWS if count <= 300] and len(asked) > 5
