"""The CUDA driver's own calls, for what PyTorch does not offer: parts of a GPU, memory of other processes.

They come through the package `cuda-bindings`, which PyTorch's CUDA builds bring with them since 2.10;
it is loaded when first needed, so that a machine without a GPU needs none of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splitwiser_lab.errors import HardwareError


def driver() -> Any:
    """The module `cuda.bindings.driver`. Raises HardwareError that says how to get it."""
    try:
        from cuda.bindings import driver as module
    except ImportError as error:
        raise HardwareError(
            f"the Python package cuda-bindings cannot be imported ({error}): install the one whose major version "
            "is that of PyTorch's CUDA, for instance `pip install 'cuda-bindings==13.*'`"
        ) from error
    return module


def call(function: str, *arguments: Any) -> Any:
    """What a function of the driver returns beside its status. Raises HardwareError when it fails or is not there."""
    module = driver()
    try:
        status, *values = getattr(module, function)(*arguments)
    except (RuntimeError, AttributeError) as error:  # no driver, or one that is older than the function
        raise HardwareError(f"the CUDA driver has no {function} ({error}): update the NVIDIA driver") from error
    if status != module.CUresult.CUDA_SUCCESS:
        raise HardwareError(f"the CUDA driver answered {status.name} to {function}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def _primary(device: int) -> tuple[Any, Any]:
    """Device and the context that PyTorch uses there. Kept for good: with its last user it would lose all memory."""
    call("cuInit", 0)
    handle = call("cuDeviceGet", device)
    return handle, call("cuDevicePrimaryCtxRetain", handle)


@contextmanager
def current(device: int) -> Iterator[Any]:
    """Make the context that PyTorch uses on GPU number `device` this thread's, and give the driver's device."""
    handle, context = _primary(device)
    call("cuCtxPushCurrent", context)
    try:
        yield handle
    finally:
        call("cuCtxPopCurrent")


def mps_enabled(device: int) -> bool:
    """Whether CUDA in this process is a client of an MPS daemon."""
    call("cuInit", 0)
    attribute = driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MPS_ENABLED
    return bool(call("cuDeviceGetAttribute", attribute, call("cuDeviceGet", device)))
