"""Which kernels run where, and the reason that is told: on GPUs made for the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from splitwiser_lab.hardware import Choice
from splitwiser_lab.model import choice
from splitwiser_lab.model.choice import choose_kernels, has_matrix_units


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Choice]]:
    """The choice for a GPU of that capability, on which the kernels are off by `error` (or raise it)."""
    choose_kernels.cache_clear()

    def choose(capability: tuple[int, int], dtype: str, error: Any = 0.0, triton: bool = True) -> Choice:
        def kernel_error(*_: object) -> float:
            if isinstance(error, Exception):
                raise error
            return float(error)

        monkeypatch.setattr(choice.torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: triton or None)
        monkeypatch.setattr(choice, "kernel_error", kernel_error)
        return choose_kernels("cuda", dtype)

    yield choose
    choose_kernels.cache_clear()


def test_a_gpu_of_today(on_gpu: Callable[..., Choice]) -> None:
    assert on_gpu((9, 0), "bfloat16", 1e-3) == (
        "triton",
        "split-KV decode in CUDA graphs, attention over pages in place",
    )


def test_a_t4_keeps_the_graphs_and_leaves_prefill_to_pytorch(on_gpu: Callable[..., Choice]) -> None:
    found = on_gpu((7, 5), "float16", 1e-4)
    assert found.value == "triton" and "before sm_80" in found.reason and "PyTorch's attention" in found.reason


def test_float32_has_no_matrix_units(on_gpu: Callable[..., Choice]) -> None:
    assert "in float32" in on_gpu((9, 0), "float32", 1e-7).reason


@pytest.mark.parametrize(
    ("error", "triton", "reason"),
    [
        (0.0, False, "Triton is not installed"),
        (RuntimeError("PTX of sm_75 is not known\nmore"), True, "do not run on this GPU: PTX of sm_75 is not known"),
        (RuntimeError(), True, "do not run on this GPU: RuntimeError"),
        (0.3, True, "off by 3.0e-01"),
        (float("nan"), True, "off by nan"),
    ],
)
def test_what_does_not_work_is_not_used(on_gpu: Callable[..., Choice], error: Any, triton: bool, reason: str) -> None:
    found = on_gpu((7, 5), "float16", error, triton)
    assert found.value == "plain" and reason in found.reason


def test_matrix_units() -> None:
    import torch

    assert has_matrix_units((8, 0), torch.float16) and has_matrix_units((9, 0), torch.bfloat16)
    assert not has_matrix_units((7, 5), torch.float16) and not has_matrix_units((9, 0), torch.float32)
