"""What one engine's lanes share, keep and give back, on a GPU made for the test."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitwiser_lab.errors import LaneError, ModeError
from splitwiser_lab.lanes import factory, streams
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.lanes.device import DeviceLane
from splitwiser_lab.lanes.factory import LaneHouse, start_all
from splitwiser_lab.lanes.partition import SmGrid
from splitwiser_lab.lanes.process import ProcessLane
from splitwiser_lab.lanes.streams import borrow, give_back

TRANSFORMER: Any = SimpleNamespace(weights=SimpleNamespace(device="cuda"))


class FakePartition:
    made = 0

    def __init__(self, device: int, decode_sms: int) -> None:
        FakePartition.made += 1
        self.decode, self.prefill = f"decode on {decode_sms}", f"prefill beside {decode_sms}"
        self.decode_sms, self.prefill_sms = decode_sms, 132 - decode_sms


class Daemon:
    """Counts the lanes that hold it."""


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> LaneHouse:
    monkeypatch.setattr(streams, "_idle", type(streams._idle)(list))
    monkeypatch.setattr(FakePartition, "made", 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: SimpleNamespace(priority=priority))
    monkeypatch.setattr(factory, "why_not", lambda kind, device: None)
    monkeypatch.setattr(factory, "grid_of", lambda device: SmGrid(132, 8, 8))
    monkeypatch.setattr(factory, "Partition", FakePartition)
    monkeypatch.setattr(factory, "daemon_of", lambda device: Daemon())
    return LaneHouse(TRANSFORMER)


def pair(house: LaneHouse, kind: Any, **options: int) -> list[Lane]:
    return [house.lane(kind, name, options) for name in ("prefill", "decode")]


def test_decode_goes_first_on_streams(house: LaneHouse) -> None:
    prefill, decode = pair(house, "stream")
    assert isinstance(prefill, DeviceLane) and isinstance(decode, DeviceLane)
    assert decode.stream.priority < prefill.stream.priority
    assert decode.stream is not prefill.stream
    main = house.lane("inline", "main", {})
    assert isinstance(main, DeviceLane)
    assert len({id(lane.stream) for lane in (main, prefill, decode)}) == 3


def test_both_lanes_of_a_division_belong_to_it(house: LaneHouse) -> None:
    prefill, decode = pair(house, "partition", decode_sms=32)
    assert isinstance(prefill, DeviceLane) and isinstance(decode, DeviceLane)
    assert (decode.stream, prefill.stream) == ("decode on 32", "prefill beside 32")
    assert FakePartition.made == 1


def test_lanes_are_kept_for_each_division(house: LaneHouse) -> None:
    """A graph keeps the SMs of its capture: going back to a split must find its lanes again."""
    first, other = pair(house, "partition", decode_sms=32), pair(house, "partition", decode_sms=64)
    assert not {id(lane) for lane in first} & {id(lane) for lane in other}
    assert pair(house, "partition", decode_sms=32) == first
    assert pair(house, "partition") == other, "half is the default"
    house.close_rivals(other, in_use=other)
    assert pair(house, "partition", decode_sms=32) == first, "and they cost nothing to keep"


def test_shares_of_mps_are_processes_of_their_own(house: LaneHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Lane] = []
    monkeypatch.setattr(ProcessLane, "close", lambda lane: closed.append(lane))
    first = pair(house, "mps", prefill_share=90, decode_share=25)
    assert pair(house, "mps") == first, "which are the defaults"
    second = pair(house, "mps", prefill_share=50, decode_share=25)
    assert second[0] is not first[0] and second[1] is first[1]
    assert second[0]._share.daemon is first[0]._share.daemon, "one daemon for all"  # type: ignore[attr-defined]
    house.close_rivals(second, in_use=first)
    assert not closed, "work is still under way there"
    third = pair(house, "mps", prefill_share=60, decode_share=25)
    house.close_rivals(third, in_use=second)
    assert closed == [first[0]]
    assert pair(house, "process") != third, "another kind is no rival"


def test_what_a_house_borrowed_serves_the_next(house: LaneHouse) -> None:
    """PyTorch keeps memory for each stream that ever computed: engines that come and go must not add up."""

    def streams_of(house: LaneHouse) -> set[int]:
        lanes = [*pair(house, "stream"), *pair(house, "partition", decode_sms=32)]
        return {id(lane.stream) for lane in lanes if isinstance(lane, DeviceLane)}

    mine, other = streams_of(house), LaneHouse(TRANSFORMER)
    theirs = streams_of(other)
    assert not mine & theirs, "both are in use"
    other.close()
    del other
    gc.collect()
    assert streams_of(LaneHouse(TRANSFORMER)) == theirs
    assert FakePartition.made == 2


def test_borrowing() -> None:
    class Owner:
        pass

    first, second = Owner(), Owner()
    made = iter(range(10))
    assert borrow(first, "key of this test", lambda: next(made)) == 0
    assert borrow(second, "key of this test", lambda: next(made)) == 1, "0 is in use"
    del first
    gc.collect()
    assert borrow(second, "key of this test", lambda: next(made)) == 0
    give_back("key of this test", 7)
    assert borrow(second, "key of this test", lambda: next(made)) == 7
    assert borrow(second, "another key of this test", lambda: next(made)) == 2


def test_a_kind_that_cannot_exist_is_refused(house: LaneHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "why_not", lambda kind, device: "there is no daemon")
    with pytest.raises(ModeError, match="no lane of kind 'mps' can be built: there is no daemon"):
        house.build("mps", "decode", {})


def test_a_lane_that_cannot_be_spawned_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    class Lame(ProcessLane):
        def __init__(self, name: str) -> None:
            self.name = name

        def spawn(self) -> None:
            begun.append(f"spawn {self.name}")
            if self.name == "one":
                raise LaneError("no daemon")

        def start(self) -> None:
            begun.append(f"start {self.name}")

    with pytest.raises(LaneError, match="no daemon"):
        start_all([Lame("one"), Lame("two")])
    assert begun == ["spawn one", "spawn two"]
