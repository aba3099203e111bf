"""What each mode needs, and what is said where it is missing: a CPU, and GPUs made for the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitwiser_lab import ModeError, supported_modes
from splitwiser_lab.engine.modes import find_mode
from splitwiser_lab.errors import HardwareError, LaneError
from splitwiser_lab.lanes import streams, support
from splitwiser_lab.lanes.partition import SmGrid
from splitwiser_lab.lanes.support import check_options, why_not


class Gpu:
    """A GPU as far as the probes look at it: everything works until a test breaks it."""

    capability = (9, 0)
    grid = SmGrid(132, 8, 8)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        for cache in (support.no_partition, support.no_sharing, support.no_mps):
            cache.cache_clear()
        self.cuda(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0)
        self.cuda(get_device_name=lambda device=0: "Imaginary GPU", get_device_capability=lambda d=0: self.capability)
        self.cuda(get_device_properties=lambda device: SimpleNamespace(uuid="1-2-3"))
        self.support(grid_of=lambda device: self.grid, Partition=lambda device, sms: (device, sms))
        self.support(_probe_in_child=lambda device, around: None, MpsShare=lambda daemon, percent: self)
        monkeypatch.setattr(streams, "_idle", type(streams._idle)(list))
        monkeypatch.setattr(support.shutil, "which", lambda program: f"somewhere/{program}")
        self.held = 0

    def cuda(self, **replacements: Any) -> None:
        for name, value in replacements.items():
            self.patch.setattr(torch.cuda, name, value)

    def support(self, **replacements: Any) -> None:
        for name, value in replacements.items():
            self.patch.setattr(support, name, value)

    # An MpsShare, too.
    def enter(self) -> dict[str, str]:
        self.held += 1
        return {"CUDA_MPS_PIPE_DIRECTORY": "folder"}

    def leave(self) -> None:
        self.held -= 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    yield Gpu(monkeypatch)
    for cache in (support.no_partition, support.no_sharing, support.no_mps):
        cache.cache_clear()


def reasons(device: str = "cuda") -> dict[str, str]:
    """What is not available, and why."""
    return {found.mode: found.reason for found in supported_modes(device) if not found.available}


def test_on_a_cpu() -> None:
    missing = reasons("cpu")
    assert set(missing) == {"streams", "partitioned", "mps"}
    assert all("shares a GPU" in missing[mode] and "CPU" in missing[mode] for mode in ("streams", "partitioned", "mps"))


def test_on_a_gpu_where_all_works(gpu: Gpu) -> None:
    assert not reasons()
    assert gpu.held == 0, "the probe's daemon is ended"
    assert streams._idle["partition", 0, 64] == [(0, 64)], "the probe's division waits for the first lanes"


def test_probes_run_once(gpu: Gpu) -> None:
    asked: list[int] = []
    gpu.support(_probe_in_child=lambda device, around: asked.append(device))
    reasons(), reasons(), find_mode("mps", "cuda")
    assert asked == [0, 0], "one without and one with the daemon"


def test_choosing_a_mode_probes_no_other(gpu: Gpu) -> None:
    gpu.support(_probe_in_child=lambda device, around: pytest.fail("this takes half a second"))
    for mode in ("sequential", "chunked", "streams", "partitioned"):
        assert find_mode(mode, "cuda").name == mode


def test_a_t4_without_the_extras(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like Colab's: sm_75, no MPS program in the container; here also without cuda-bindings."""
    gpu.capability = (7, 5)
    monkeypatch.setattr(support.shutil, "which", lambda program: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)

    def no_bindings(*arguments: Any) -> Any:
        from splitwiser_lab.cuda_driver import driver

        return driver()

    gpu.support(grid_of=no_bindings, _probe_in_child=lambda device, around: _error(no_bindings))
    missing = reasons()
    assert "cuda-bindings" in missing["partitioned"] and "pip install" in missing["partitioned"]
    assert "cuda-bindings" in missing["processes"]
    assert "nvidia-cuda-mps-control is not on the PATH" in missing["mps"]
    assert {"sequential", "chunked", "streams"}.isdisjoint(missing)


def _error(function: Any) -> str:
    try:
        function()
    except HardwareError as error:
        return str(error)
    raise AssertionError


def test_a_t4_with_all(gpu: Gpu) -> None:
    gpu.capability, gpu.grid = (7, 5), SmGrid(40, 2, 2)
    assert not reasons()
    assert streams._idle["partition", 0, 20]


def test_a_gpu_before_volta(gpu: Gpu) -> None:
    gpu.capability = (6, 1)
    assert "sm_61 gives MPS clients no shares" in reasons()["mps"]


def test_a_gpu_too_small_to_divide(gpu: Gpu) -> None:
    gpu.grid = SmGrid(14, 8, 8)
    assert "14 SMs are too few" in reasons()["partitioned"]


def test_a_daemon_that_does_not_start(gpu: Gpu) -> None:
    def refuse() -> dict[str, str]:
        raise LaneError("the MPS daemon did not start: it said no")

    gpu.enter = refuse  # type: ignore[method-assign]
    assert "it said no" in reasons()["mps"]


def test_memory_that_clients_cannot_map(gpu: Gpu) -> None:
    gpu.support(_probe_in_child=lambda device, around: "cannot map" if around else None)
    missing = reasons()
    assert missing["mps"] == "cannot map" and "processes" not in missing
    assert gpu.held == 0


def test_without_cuda_ipc(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    missing = reasons()
    assert "Linux, macOS" in missing["processes"] and "Linux, macOS" in missing["mps"]


def test_a_mode_that_cannot_run_says_which_can(gpu: Gpu) -> None:
    gpu.grid = SmGrid(14, 8, 8)
    with pytest.raises(ModeError, match=r"'partitioned' cannot run on cuda here: 14 SMs.*sequential, chunked, proc"):
        find_mode("partitioned", "cuda")


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("partitioned", {"decode_sms": 63}, "multiple of 8 from 8 to 120"),
        ("mps", {"prefill_share": 101}, "prefill_share=101: give a percentage"),
        ("mps", {"decode_share": 0}, "decode_share=0.*at least 1"),
        ("processes", {"decode_cores": 1}, "divides the cores of a CPU"),
        ("streams", {"decode_sms": 64}, "'streams' has no option 'decode_sms'"),
    ],
)
def test_options_are_checked_at_the_door(gpu: Gpu, mode: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ModeError, match=message):
        find_mode(mode, "cuda").check(options, "cuda")


def test_good_options_pass(gpu: Gpu) -> None:
    find_mode("partitioned", "cuda").check({"decode_sms": 96}, "cuda")
    find_mode("mps", "cuda").check({"prefill_share": 100, "decode_share": 1}, "cuda")
    check_options({"prefill": "process", "decode": "process"}, "cpu", {"decode_cores": 1})


def test_windows_has_no_processes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert "Linux, macOS" in (why_not("process", "cpu") or "")
