"""Memory that other processes can map, and that no crash can leave behind.

On a CPU, Linux gives an anonymous file (`memfd_create`), other systems an unlinked temporary file. Either
has no name, so it is gone with the last process that holds it: nothing to clean up, whatever happened.
Unlike /dev/shm, which containers often limit to 64 MB, an anonymous file may use all free memory.
On a GPU it is ordinary memory of this process, which others map by a handle (CUDA IPC); it is gone with
this process, so that those who map it must end first.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitwiser_lab.cuda_driver import call, current, driver
from splitwiser_lab.errors import HardwareError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceHandle:
    """Names a piece of GPU memory in other processes: the allocation it lies in, and where in it."""

    allocation: bytes
    offset: int


Handle = int | DeviceHandle  # an int is a file descriptor, which a child inherits


class SharedBuffer:
    """`nbytes` of zeroed memory behind a file descriptor that a child process can inherit."""

    def __init__(self, nbytes: int, fd: int | None = None) -> None:
        """Allocate, or map an inherited `fd`. Raises HardwareError when the system has no room."""
        self.nbytes = nbytes
        try:
            self.fd = _anonymous_file(nbytes) if fd is None else fd
            self._map = mmap.mmap(self.fd, nbytes)
            weakref.finalize(self, os.close, self.fd)  # the mapping has its own descriptor
        except OSError as error:
            raise _no_room(nbytes, error) from error

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """A view of the buffer from byte `offset` on; it keeps the mapping alive."""
        import torch

        with torch.inference_mode(False):  # a caller in that mode must not make memory that only it can write to
            return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def export(self) -> int:
        """The descriptor, by which a child that inherits it maps the same memory."""
        return self.fd


class DeviceBuffer:
    """`nbytes` of zeroed memory of a GPU, which other processes on the same GPU can map."""

    def __init__(self, nbytes: int, device: str, handle: DeviceHandle | None = None) -> None:
        """Allocate, or map what another process exported. Raises HardwareError when the GPU has no room."""
        import torch

        self.nbytes = nbytes
        try:
            if handle is None:
                with torch.inference_mode(False):  # as in SharedBuffer.tensor
                    self._bytes = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            else:
                index = torch.empty(0, device=device).device.index
                self._bytes = torch.as_tensor(_Foreign(map_memory(handle, index), nbytes), device=device)
        except torch.OutOfMemoryError as error:
            raise _no_room(nbytes, error) from error

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """A view of the buffer from byte `offset` on."""
        return self._bytes[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def export(self) -> DeviceHandle:
        """The handle by which another process maps the same memory, once all that was written is there.

        Raises HardwareError where the driver cannot share it.
        """
        import torch

        # Not the whole device: a lane may be capturing a graph meanwhile, which that would spoil.
        for stream in torch.cuda.default_stream(self._bytes.device), torch.cuda.current_stream(self._bytes.device):
            stream.synchronize()
        pointer = self._bytes.data_ptr()
        with current(self._bytes.device.index):
            try:
                base, _ = call("cuMemGetAddressRange", pointer)
                handle = call("cuIpcGetMemHandle", base)
            except HardwareError as error:
                raise HardwareError(
                    f"this GPU's memory cannot be shared with other processes: {error}. CUDA IPC needs Linux and "
                    "plain allocations: unset expandable_segments in PYTORCH_ALLOC_CONF"
                ) from error
        return DeviceHandle(bytes(handle.reserved), pointer - int(base))


def map_memory(handle: DeviceHandle, device: int) -> int:
    """The address, in this process and on GPU number `device`, of memory that another process exported.

    It stays mapped until this process ends. Raises HardwareError when the driver cannot map it.
    """
    module = driver()
    allocation = module.CUipcMemHandle()
    allocation.reserved = handle.allocation
    with current(device):
        lazily = module.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return int(call("cuIpcOpenMemHandle", allocation, lazily)) + handle.offset


@dataclass(frozen=True)
class _Foreign:
    """Memory at an address, in the form from which PyTorch makes a tensor without copying."""

    address: int
    nbytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


Buffer = SharedBuffer | DeviceBuffer


def allocate(nbytes: int, device: str) -> Buffer:
    """Zeroed memory on `device` that other processes can map. Raises HardwareError when there is no room."""
    return DeviceBuffer(nbytes, device) if device.startswith("cuda") else SharedBuffer(nbytes)


def attach(handle: Handle, nbytes: int, device: str) -> Buffer:
    """Map what another process exported. Raises HardwareError when it cannot be mapped here."""
    if isinstance(handle, DeviceHandle):
        return DeviceBuffer(nbytes, device, handle)
    return SharedBuffer(nbytes, handle)


def _no_room(nbytes: int, error: Exception) -> HardwareError:
    return HardwareError(
        f"cannot share {nbytes / 2**20:.0f} MiB of memory between processes ({error}). "
        "Free memory, choose a smaller kv_tokens, or a smaller model."
    )


def _anonymous_file(nbytes: int) -> int:
    if sys.platform == "linux":
        fd = os.memfd_create("splitwiser_lab")
    else:
        with tempfile.TemporaryFile() as file:  # already unlinked
            fd = os.dup(file.fileno())
    os.ftruncate(fd, nbytes)
    return fd
