"""Memory that other processes can map, and that no crash can leave behind.

Linux gives an anonymous file (`memfd_create`), other systems an unlinked temporary file. Either has
no name, so it is gone with the last process that holds it: nothing to clean up, whatever happened.
Unlike /dev/shm, which containers often limit to 64 MB, an anonymous file may use all free memory.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from typing import TYPE_CHECKING

from splitwiser_lab.errors import HardwareError

if TYPE_CHECKING:
    import torch


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
            raise HardwareError(
                f"cannot share {nbytes / 2**20:.0f} MiB of memory between processes ({error}). "
                "Free memory, choose a smaller kv_tokens, or a smaller model."
            ) from error

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """A view of the buffer from byte `offset` on; it keeps the mapping alive."""
        import math

        import torch

        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def _anonymous_file(nbytes: int) -> int:
    if sys.platform == "linux":
        fd = os.memfd_create("splitwiser_lab")
    else:
        with tempfile.TemporaryFile() as file:  # already unlinked
            fd = os.dup(file.fileno())
    os.ftruncate(fd, nbytes)
    return fd
