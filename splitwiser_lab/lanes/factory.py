"""Building lanes by kind, and saying why a kind cannot exist on a device."""

from __future__ import annotations

import sys
from typing import Literal

import torch

from splitwiser_lab.errors import LaneError, ModeError
from splitwiser_lab.hardware import cores
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.lanes.device import DeviceLane
from splitwiser_lab.lanes.inline import InlineLane
from splitwiser_lab.lanes.process import ProcessLane
from splitwiser_lab.model.transformer import Transformer

LaneKind = Literal["inline", "process", "stream", "partition", "mps", "auto"]


def why_not(kind: LaneKind, device: str) -> str | None:
    """None if a lane of this kind can run on `device`, else the reason and what would help."""
    on_gpu = torch.device(device).type == "cuda"
    if kind == "inline":
        return None
    if kind == "process":
        if sys.platform == "win32":
            return "process lanes need memory shared by file descriptor (Linux, macOS)"
        return "process lanes on a GPU are not part of this version" if on_gpu else None
    return "not part of this version" if on_gpu else "it shares a GPU, and this device is a CPU"


def build_lane(kind: LaneKind, name: str, transformer: Transformer) -> Lane:
    """A lane of this kind over the transformer's weights and pool, not yet started."""
    device = torch.device(transformer.weights.device)
    if kind == "inline":
        if device.type == "cuda":
            return DeviceLane(name, transformer, torch.cuda.Stream(device))
        return InlineLane(name, transformer)
    if kind == "process":
        return ProcessLane(name, transformer)
    raise ModeError(f"no lane of kind {kind!r} can be built: {why_not(kind, transformer.weights.device)}.")


def start_all(lanes: list[Lane]) -> None:
    """Start lanes side by side: those in processes load at the same time. Raises LaneError."""
    for lane in lanes:
        if isinstance(lane, ProcessLane):
            lane.spawn()
    failures = []
    for lane in lanes:  # all of them, so that none is left half started
        try:
            lane.start()
        except LaneError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def share_cores(lanes: list[Lane], decode_cores: int | None = None) -> dict[str, list[int]]:
    """The cores of each lane by name: `decode_cores` for decode, the rest for prefill; a single core is shared.

    Empty when the lanes need no share. Raises ModeError when a share would be empty.
    """
    if not any(isinstance(lane, ProcessLane) for lane in lanes):
        return {}
    available = cores()
    count = max(1, len(available) // 2) if decode_cores is None else decode_cores
    if len(available) == 1:
        return {lane.name: available for lane in lanes}
    if count >= len(available):
        raise ModeError(
            f"decode_cores={count} leaves none of this machine's {len(available)} cores to prefill: "
            f"give at most {len(available) - 1}."
        )
    return {lane.name: available[:count] if lane.name == "decode" else available[count:] for lane in lanes}
