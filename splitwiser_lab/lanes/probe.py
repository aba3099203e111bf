"""What a process lane will need of CUDA, tried in a child without loading torch: map memory and read it."""

from __future__ import annotations

import ctypes
import sys

from splitwiser_lab.cuda_driver import call, current, mps_enabled
from splitwiser_lab.shared_memory import DeviceHandle, map_memory

MARK = 42  # what every byte of the memory holds


def main(allocation: str, offset: int, nbytes: int, device: int, under_mps: int) -> None:
    """Read `nbytes` that the parent exported. Raises HardwareError, or SystemExit with the reason."""
    if under_mps and not mps_enabled(device):
        raise SystemExit("CUDA started without the MPS daemon")
    address = map_memory(DeviceHandle(bytes.fromhex(allocation), offset), device)
    copy = (ctypes.c_ubyte * nbytes)()
    with current(device):
        call("cuMemcpyDtoH", ctypes.addressof(copy), address, nbytes)
    if set(copy) != {MARK}:
        raise SystemExit("what it reads there is not what was written")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
