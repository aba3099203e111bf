"""Which kinds of lane a device can have, and why not: each mechanism is tried once before it is offered."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from typing import Any, Literal

import torch

from splitwiser_lab.cuda_driver import driver
from splitwiser_lab.errors import HardwareError, LaneError, ModeError
from splitwiser_lab.lanes.child import environment
from splitwiser_lab.lanes.mps import DEFAULT_SHARES, MpsDaemon, MpsShare
from splitwiser_lab.lanes.mps_guard import CONTROL
from splitwiser_lab.lanes.partition import Partition, grid_of
from splitwiser_lab.lanes.probe import MARK
from splitwiser_lab.lanes.streams import give_back
from splitwiser_lab.shared_memory import DeviceBuffer

LaneKind = Literal["inline", "process", "stream", "partition", "mps"]
_PROBE_SECONDS = 60.0
_PROBE_BYTES = 4096


def why_not(kind: LaneKind, device: str) -> str | None:
    """None if a lane of this kind can run on `device`, else the reason and what would help."""
    where = torch.device(device)
    if where.type == "cpu":
        if kind in ("inline", "process"):
            return _no_processes() if kind == "process" else None
        return "it shares a GPU between two lanes, and this device is a CPU"
    if kind in ("inline", "stream"):
        return None
    return {"partition": no_partition, "process": no_sharing, "mps": no_mps}[kind](index_of(where))


def check_options(kinds: dict[str, LaneKind], device: str, options: dict[str, Any]) -> None:
    """Raise ModeError for options that these lanes (kinds by name) cannot have on `device`."""
    where = torch.device(device)
    if "partition" in kinds.values():
        grid_of(index_of(where)).decode_sms(options.get("decode_sms"))
    if "process" in kinds.values() and "decode_cores" in options and where.type == "cuda":
        raise ModeError("decode_cores divides the cores of a CPU: on a GPU, leave it out.")
    for name, kind in kinds.items():
        share = options.get(f"{name}_share", DEFAULT_SHARES.get(name))
        if kind == "mps" and share is not None and share > 100:
            raise ModeError(f"{name}_share={share}: give a percentage of the SMs, 1 to 100.")


def index_of(device: torch.device) -> int:
    """The number of a GPU; without one, that of the current GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


def only_visible(device: torch.device) -> dict[str, str]:
    """The environment of a process that is to see this GPU and no other."""
    seen, index = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","), index_of(device)
    return {"CUDA_VISIBLE_DEVICES": seen[index] if index < len(seen) and seen[index] else str(index)}


@functools.cache
def no_partition(device: int) -> str | None:
    """Why GPU number `device` cannot be divided, or None. Divides it once; the first lanes use that division."""
    try:
        sms = grid_of(device).decode_sms()
        give_back(("partition", device, sms), Partition(device, sms))
    except (HardwareError, ModeError) as error:
        return str(error)
    return None


@functools.cache
def no_sharing(device: int) -> str | None:
    """Why another process cannot map memory of GPU number `device`, or None. Lets one try."""
    return _no_processes() or _probe_in_child(device, {})


@functools.cache
def no_mps(device: int) -> str | None:
    """Why MPS cannot serve lanes on GPU number `device`, or None. Starts a daemon, lets a client map memory."""
    if reason := _no_processes():
        return reason
    if shutil.which(CONTROL) is None:
        return f"the program {CONTROL} is not on the PATH: it comes with the NVIDIA driver's compute utilities"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"sm_{major}{minor} gives MPS clients no shares of the SMs (sm_70 and newer do)"
    share = MpsShare(daemon_of(device), 50)
    try:
        around = share.enter()
    except LaneError as error:
        return str(error)
    try:
        return _probe_in_child(device, around)
    finally:
        share.leave()


def daemon_of(device: int) -> MpsDaemon:
    """A daemon, not yet started, that serves GPU number `device` alone."""
    return MpsDaemon(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _no_processes() -> str | None:
    if sys.platform == "win32":
        return "process lanes need memory shared by file descriptor (Linux, macOS)"
    return None


def _probe_in_child(device: int, around: dict[str, str]) -> str | None:
    """Why a child with `around` in its environment cannot map memory of this process, or None."""
    try:
        driver()  # before any memory, to say first what is missing
        buffer = DeviceBuffer(_PROBE_BYTES, f"cuda:{device}")
        buffer.tensor(torch.uint8, (_PROBE_BYTES,)).fill_(MARK)
        handle = buffer.export()
    except HardwareError as error:
        return str(error)
    there = 0 if around else device  # an MPS client sees only the GPU of its daemon
    request = [handle.allocation.hex(), handle.offset, _PROBE_BYTES, there, int(bool(around))]
    try:
        child = subprocess.run(
            [sys.executable, "-m", "splitwiser_lab.lanes.probe", *map(str, request)],
            env=environment(around),
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
            process_group=0,
        )
    except subprocess.TimeoutExpired:
        return f"a process that tried to map this GPU's memory did not answer within {_PROBE_SECONDS:.0f} s"
    last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return None if child.returncode == 0 else f"another process cannot map this GPU's memory: {last}"
