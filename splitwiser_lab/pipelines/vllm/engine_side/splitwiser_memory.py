"""Memory that the engines of a split share: of the host, behind a file descriptor, or of their GPU, by CUDA IPC.

The parent has made it and outlives the engines. On a GPU it is mapped through the driver alone, since how PyTorch
shares its tensors differs between the parent's version and vLLM's.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from typing import Any, Protocol

import torch

_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag there is


class Memory(Protocol):
    """Bytes that other processes see, too."""

    on_gpu: bool

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """A tensor over them from byte `offset` on."""
        ...


class HostMemory:
    """An inherited file descriptor, mapped."""

    on_gpu = False

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


class DeviceMemory:
    """`nbytes` at `offset` of an allocation on this process's GPU, named by the driver's handle for it."""

    on_gpu = True

    def __init__(self, handle: bytes, offset: int, nbytes: int) -> None:
        torch.cuda.current_stream().synchronize()  # now this thread has a context
        address = open_handle(handle, ctypes.CDLL("libcuda.so.1")) + offset
        with torch.inference_mode(False):  # else only that mode could write to it
            self._bytes = torch.as_tensor(_Foreign(address, nbytes), device="cuda")

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        return self._bytes[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class _Foreign:
    """Memory at an address, in the form from which PyTorch makes a tensor without copying."""

    def __init__(self, address: int, nbytes: int) -> None:
        data = (address, False)
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": data, "version": 3}


def open_handle(handle: bytes, driver: Any) -> int:
    """The address here of an allocation that another process exported. Raises RuntimeError with the driver's number."""
    given, address = _Handle(), ctypes.c_uint64()
    ctypes.memmove(ctypes.byref(given), handle, len(handle))
    error = driver.cuIpcOpenMemHandle_v2(ctypes.byref(address), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
    if error:
        raise RuntimeError(
            f"CUDA error {error}: this process cannot map the GPU memory that prefill and decode share: "
            "use the connector 'example'"
        )
    return int(address.value)


def memory_of(described: dict[str, Any]) -> Memory:
    """The memory that the parent described: `{"fd": 7}`, or `{"handle": hex, "offset": bytes, "nbytes": bytes}`."""
    if "fd" in described:
        return HostMemory(int(described["fd"]))
    return DeviceMemory(bytes.fromhex(described["handle"]), int(described["offset"]), int(described["nbytes"]))
