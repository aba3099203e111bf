"""What is chosen automatically, with its reason, for machines that are here and machines that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from splitwiser_lab import HardwareError, supported_modes
from splitwiser_lab.engine.modes import MODES
from splitwiser_lab.hardware import choose_device, choose_dtype, cores, describe, free_memory_bytes

Gpus = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Makes PyTorch see so many GPUs of this compute capability."""

    def pretend(count: int, capability: tuple[int, int] = (9, 0), build: str | None = "13.0") -> None:
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "Imaginary GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (3 * 2**30, 16 * 2**30))
        # Older GPUs emulate bfloat16 and PyTorch says that they support it: the choice must not believe it.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)

    return pretend


@pytest.mark.parametrize(
    ("capability", "dtype", "because"),
    [
        ((7, 0), "float16", "sm_70 has no bfloat16"),
        ((7, 5), "float16", "sm_75 has no bfloat16"),
        ((8, 0), "bfloat16", "sm_80 computes in bfloat16"),
        ((8, 9), "bfloat16", "sm_89"),
        ((9, 0), "bfloat16", "sm_90"),
        ((12, 0), "bfloat16", "sm_120"),
    ],
)
def test_dtype_of_a_gpu(gpus: Gpus, capability: tuple[int, int], dtype: str, because: str) -> None:
    gpus(1, capability)
    choice = choose_dtype("cuda")
    assert choice.value == dtype
    assert because in choice.reason


def test_dtype_of_a_cpu() -> None:
    choice = choose_dtype("cpu")
    assert choice.value == "float32"
    assert "exactly those of transformers" in choice.reason


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_asked_for(dtype: object) -> None:
    assert choose_dtype("cpu", dtype) == ("bfloat16", "asked for")


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp16", "", torch.int32])
def test_unknown_dtype(dtype: object) -> None:
    with pytest.raises(HardwareError, match="use 'auto' or one of float32, bfloat16, float16"):
        choose_dtype("cpu", dtype)


@pytest.mark.parametrize(
    ("count", "build", "device", "because"),
    [
        (1, "13.0", "cuda", "Imaginary GPU"),
        (0, "13.0", "cpu", "no NVIDIA GPU"),
        (0, None, "cpu", "CPU build"),
    ],
)
def test_automatic_device(gpus: Gpus, count: int, build: str | None, device: str, because: str) -> None:
    gpus(count, build=build)
    choice = choose_device("auto")
    assert choice.value == device
    assert because in choice.reason


def test_device_asked_for(gpus: Gpus) -> None:
    gpus(2)
    assert choose_device("cuda:1").value == "cuda:1"
    assert choose_device("cpu").value == "cpu"


@pytest.mark.parametrize("device", ["tpu", "gpu", "", "cuda:x", "mps", "meta"])
def test_device_of_another_kind(device: str) -> None:
    with pytest.raises(HardwareError, match=f"'{device}' is not supported: use 'auto', 'cpu' or 'cuda'"):
        choose_device(device)


def test_device_that_is_not_there(gpus: Gpus) -> None:
    gpus(2)
    with pytest.raises(HardwareError, match=r"'cuda:2' is not there: it sees 2 GPU"):
        choose_device("cuda:2")
    gpus(0)
    with pytest.raises(HardwareError, match=r"'cuda' is not there: it sees 0 GPU.*device='cpu'"):
        choose_device("cuda")
    gpus(0, build=None)
    with pytest.raises(HardwareError, match="CPU build"):
        choose_device("cuda:0")


def test_modes_of_a_cpu() -> None:
    found = {mode.mode: mode for mode in supported_modes("cpu")}
    assert list(found) == list(MODES)
    assert {name for name, mode in found.items() if mode.available} == {"sequential", "chunked", "processes", "auto"}
    for mode in found.values():
        assert mode.reason, f"{mode.mode} gives no reason"


def test_modes_of_a_gpu(gpus: Gpus) -> None:
    gpus(1)
    found = {mode.mode: mode for mode in supported_modes()}
    assert {name for name, mode in found.items() if mode.available} >= {"sequential", "chunked"}
    assert all(mode.reason for mode in found.values())


def test_facts_of_this_machine() -> None:
    facts = describe("cpu")
    assert facts.cores == len(cores()) >= 1
    assert facts.capability is None
    assert 0 < free_memory_bytes("cpu") <= facts.memory_bytes
    assert json.loads(json.dumps(facts.to_dict()))["torch"] == torch.__version__


def test_facts_of_a_gpu(gpus: Gpus) -> None:
    gpus(1, (7, 5))
    facts = describe()
    assert (facts.device, facts.device_name, facts.memory_bytes) == ("cuda", "Imaginary GPU", 16 * 2**30)
    assert facts.to_dict()["capability"] == [7, 5]
    assert free_memory_bytes("cuda") == 3 * 2**30
