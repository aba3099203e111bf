"""How a GPU is divided: the arithmetic, and what the driver is asked for, on drivers made for the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitwiser_lab import cuda_driver
from splitwiser_lab.errors import HardwareError, ModeError
from splitwiser_lab.lanes import partition
from splitwiser_lab.lanes.partition import Partition, SmGrid, grid_of

H200, T4, A10 = SmGrid(132, 8, 8), SmGrid(40, 2, 2), SmGrid(72, 4, 2)


@pytest.mark.parametrize(
    ("grid", "half", "first", "last", "count"),
    [(H200, 64, 8, 120, 15), (T4, 20, 2, 38, 19), (A10, 36, 4, 68, 33), (SmGrid(16, 8, 8), 8, 8, 8, 1)],
)
def test_what_decode_can_have(grid: SmGrid, half: int, first: int, last: int, count: int) -> None:
    allowed = grid.allowed
    assert (allowed[0], allowed[-1], len(allowed)) == (first, last, count)
    assert grid.decode_sms() == half
    for sms in allowed:
        assert grid.decode_sms(sms) == sms
        assert sms % grid.step == 0 and sms >= grid.smallest and grid.total - sms >= grid.smallest


@pytest.mark.parametrize("asked", [1, 7, 63, 65, 124, 128, 132, 1000])
def test_a_number_that_is_not_possible_is_answered_with_those_that_are(asked: int) -> None:
    with pytest.raises(ModeError, match=rf"decode_sms={asked} is not possible.*132 SMs.*multiple of 8 from 8 to 120"):
        H200.decode_sms(asked)


def test_a_gpu_that_is_too_small() -> None:
    assert not SmGrid(14, 8, 8).allowed
    with pytest.raises(ModeError, match="14 SMs are too few for two parts of at least 8"):
        SmGrid(14, 8, 8).decode_sms()


def test_the_first_part_is_a_multiple_of_the_step_even_if_the_smallest_is_not() -> None:
    assert SmGrid(40, 3, 2).allowed[0] == 4


class Status(IntEnum):
    """What the driver answers."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeDriver:
    """A driver of a GPU with so many SMs, that rounds up to `step` and notes what it was asked."""

    CUresult = Status
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, total: int, step: int, tells: bool = True) -> None:
        self.total, self.step, self.tells = total, step, tells
        self.splits = 0
        self.current: list[str] = []
        self.streams: list[tuple[int, int]] = []  # SMs and priority

    def resource(self, sms: int) -> SimpleNamespace:
        told = {"minSmPartitionSize": self.step, "smCoscheduledAlignment": self.step} if self.tells else {}
        return SimpleNamespace(sm=SimpleNamespace(smCount=sms, **told))

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS,)

    def cuDeviceGet(self, number: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, f"gpu {number}"

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, "primary"

    def cuCtxPushCurrent(self, context: str) -> tuple[Any, ...]:
        self.current.append(context)
        return (Status.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, self.current.pop()

    def cuDeviceGetDevResource(self, device: str, kind: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, self.resource(self.total)

    def cuDevSmResourceSplitByCount(self, groups: int, whole: Any, flags: int, count: int) -> tuple[Any, ...]:
        assert groups == 1 and whole.sm.smCount == self.total
        self.splits += 1
        first = -(-count // self.step) * self.step
        return Status.CUDA_SUCCESS, [self.resource(first)], 1, self.resource(self.total - first)

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> tuple[Any, ...]:
        assert count == len(resources) == 1
        return Status.CUDA_SUCCESS, resources[0]

    def cuGreenCtxCreate(self, description: Any, device: str, flags: int) -> tuple[Any, ...]:
        assert self.current, "a context must be current"
        return Status.CUDA_SUCCESS, description

    def cuGreenCtxStreamCreate(self, context: Any, flags: int, priority: int) -> tuple[Any, ...]:
        self.streams.append((context.sm.smCount, priority))
        return Status.CUDA_SUCCESS, 1000 + len(self.streams)

    def cuGreenCtxGetDevResource(self, context: Any, kind: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, context


UseDriver = Callable[..., Any]


@pytest.fixture
def use_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[UseDriver]:
    """Puts a driver in the place of `cuda.bindings.driver`, on a GPU of this compute capability."""
    caches = (grid_of, cuda_driver._primary)

    def use(driver: Any, capability: tuple[int, int] = (9, 0)) -> Any:
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capability)
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, device))
        return driver

    yield use
    for cache in caches:
        cache.cache_clear()


def test_one_split_makes_both_parts(use_driver: UseDriver) -> None:
    """Two splits of the whole device would give overlapping parts."""
    driver = use_driver(FakeDriver(132, 8))
    made = Partition(0, 64)
    assert driver.splits == 1
    assert driver.streams == [(64, -1), (68, 0)], "decode first, at high priority, and prefill on the rest"
    assert (made.decode, made.prefill) == ((1001, 0), (1002, 0))
    assert (made.decode_sms, made.prefill_sms) == (64, 68)
    assert driver.current == []


@pytest.mark.parametrize(
    ("capability", "grid"),
    [((7, 5), SmGrid(40, 2, 2)), ((8, 6), SmGrid(40, 4, 2)), ((9, 0), SmGrid(40, 8, 8)), ((10, 0), SmGrid(40, 8, 8))],
)
def test_the_steps_of_drivers_that_do_not_tell(
    use_driver: UseDriver, capability: tuple[int, int], grid: SmGrid
) -> None:
    use_driver(FakeDriver(40, 8, tells=False), capability)
    assert grid_of(0) == grid


def test_what_the_driver_tells_counts_more(use_driver: UseDriver) -> None:
    use_driver(FakeDriver(40, 4), (7, 5))
    assert grid_of(0) == SmGrid(40, 4, 4)


def test_a_split_that_is_not_the_one_asked_for_is_refused(use_driver: UseDriver) -> None:
    use_driver(FakeDriver(132, 8))
    with pytest.raises(HardwareError, match="divided 132 SMs into 64 and 68, where 60"):
        Partition(0, 60)


def test_a_context_that_got_other_sms_is_refused(use_driver: UseDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use_driver(FakeDriver(132, 8))
    driver.cuGreenCtxGetDevResource = lambda context, kind: (Status.CUDA_SUCCESS, driver.resource(132))
    with pytest.raises(HardwareError, match="a green context got 132 SMs, not 64"):
        Partition(0, 64)


def test_a_driver_that_refuses_is_named_with_its_answer(use_driver: UseDriver) -> None:
    driver = use_driver(FakeDriver(132, 8))
    driver.cuGreenCtxCreate = lambda *arguments: (Status.CUDA_ERROR_NOT_SUPPORTED, None)
    with pytest.raises(HardwareError, match="CUDA_ERROR_NOT_SUPPORTED to cuGreenCtxCreate"):
        Partition(0, 64)
    assert driver.current == [], "the thread's context is as it was"


def test_a_driver_that_is_too_old(use_driver: UseDriver) -> None:
    class Old(FakeDriver):
        def cuDeviceGetDevResource(self, device: str, kind: int) -> tuple[Any, ...]:
            raise RuntimeError("Function not found")

    use_driver(Old(132, 8))
    with pytest.raises(HardwareError, match=r"no cuDeviceGetDevResource.*update the NVIDIA driver"):
        grid_of(0)


def test_without_the_bindings_the_way_to_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(HardwareError, match=r"cuda-bindings cannot be imported.*pip install"):
        partition.driver()
