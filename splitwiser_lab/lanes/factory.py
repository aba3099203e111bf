"""The lanes of one engine: built by kind, kept for the next time their mode is chosen, closed together."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from splitwiser_lab.errors import LaneError, ModeError
from splitwiser_lab.hardware import cores
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.lanes.device import DeviceLane
from splitwiser_lab.lanes.inline import InlineLane
from splitwiser_lab.lanes.mps import DEFAULT_SHARES, MpsDaemon, MpsShare
from splitwiser_lab.lanes.partition import Partition, grid_of
from splitwiser_lab.lanes.process import ProcessLane
from splitwiser_lab.lanes.streams import borrow, stream_of
from splitwiser_lab.lanes.support import LaneKind, daemon_of, index_of, why_not
from splitwiser_lab.model.transformer import Transformer

Key = tuple[LaneKind, str, int | None]  # kind, name, and the share of the GPU that the lane was built for


class LaneHouse:
    """Builds lanes over one transformer. What lanes share (parts of a GPU, the MPS daemon) belongs to the house."""

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer
        self._device = torch.device(transformer.weights.device)
        self._kept: dict[Key, Lane] = {}
        self._partitions: dict[int, Partition] = {}
        self._daemon: MpsDaemon | None = None

    def lane(self, kind: LaneKind, name: str, options: dict[str, Any]) -> Lane:
        """The lane of that kind, name and share: made once, kept for the next time."""
        key = (kind, name, self._share(kind, name, options))
        if key not in self._kept:
            self._kept[key] = self.build(kind, name, options)
        return self._kept[key]

    def build(self, kind: LaneKind, name: str, options: dict[str, Any]) -> Lane:
        """A new lane, not yet started, that the caller closes. Raises ModeError when it cannot exist here."""
        if reason := why_not(kind, str(self._device)):
            raise ModeError(f"no lane of kind {kind!r} can be built: {reason}.")
        share = self._share(kind, name, options)
        if kind == "process":
            return ProcessLane(name, self._transformer)
        if kind == "mps":
            assert share is not None
            return ProcessLane(name, self._transformer, MpsShare(self._shared_daemon(), share))
        if self._device.type == "cpu":
            return InlineLane(name, self._transformer)
        if kind == "partition":
            assert share is not None
            partition = self._partition(share)
            decode = name == "decode"
            stream = partition.decode if decode else partition.prefill
            sms = partition.decode_sms if decode else partition.prefill_sms
            return DeviceLane(name, self._transformer, stream, sms, f"in a green context with {sms} SMs")
        high = kind == "stream" and name == "decode"
        return DeviceLane(name, self._transformer, stream_of(self, self._device, high))

    def running(self) -> set[LaneKind]:
        """The kinds of which a lane in another process runs now."""
        return {key[0] for key, lane in self._kept.items() if isinstance(lane, ProcessLane) and lane.pid}

    def close_rivals(self, chosen: Collection[Lane], in_use: Collection[Lane]) -> None:
        """Close lane processes that differ from a chosen lane in nothing but their share, unless they are in use.

        Each holds some hundred MB of the GPU; a share of SMs without a process costs nothing and is kept.
        """
        taken = {key[:2] for key, lane in self._kept.items() if lane in chosen}
        for key, lane in list(self._kept.items()):
            if isinstance(lane, ProcessLane) and key[:2] in taken and lane not in chosen and lane not in in_use:
                lane.close()
                del self._kept[key]

    def close(self) -> None:
        """Close all lanes kept here."""
        for lane in self._kept.values():
            lane.close()
        self._kept.clear()
        self._partitions.clear()

    def _share(self, kind: LaneKind, name: str, options: dict[str, Any]) -> int | None:
        """What sets this lane apart from others of its kind and name: SMs of decode, or percent of all SMs."""
        if kind == "partition":
            return grid_of(index_of(self._device)).decode_sms(options.get("decode_sms"))
        if kind == "mps":
            return int(options.get(f"{name}_share", DEFAULT_SHARES.get(name, 100)))
        return None

    def _partition(self, sms: int) -> Partition:
        if sms not in self._partitions:
            index = index_of(self._device)
            self._partitions[sms] = borrow(self, ("partition", index, sms), lambda: Partition(index, sms))
        return self._partitions[sms]

    def _shared_daemon(self) -> MpsDaemon:
        if self._daemon is None:
            self._daemon = daemon_of(index_of(self._device))
        return self._daemon


def start_all(lanes: list[Lane]) -> None:
    """Start lanes side by side: those in processes load at the same time. Raises LaneError."""
    failures: list[LaneError] = []
    for lane in lanes:  # all of them, so that none is left half started
        if isinstance(lane, ProcessLane):
            with _collect(failures):
                lane.spawn()
    for lane in lanes if not failures else []:
        with _collect(failures):
            lane.start()
    if failures:
        raise failures[0]


@contextmanager
def _collect(failures: list[LaneError]) -> Iterator[None]:
    try:
        yield
    except LaneError as error:
        failures.append(error)


def share_cores(lanes: list[Lane], decode_cores: int | None = None) -> dict[str, list[int]]:
    """The cores of each lane by name: `decode_cores` for decode, the rest for prefill; a single core is shared.

    Empty when the lanes need no share. Raises ModeError when a share would be empty.
    """
    if not any(isinstance(lane, ProcessLane) and lane.on_cpu for lane in lanes):
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
