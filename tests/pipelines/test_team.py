"""What the workers of a team are told on a GPU: fakes stand for the GPU and the processes."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitwiser_lab.lanes.mps import MpsShare
from splitwiser_lab.pipelines import team
from splitwiser_lab.pipelines.kv import KVLayout
from splitwiser_lab.pipelines.messages import Setup
from splitwiser_lab.pipelines.placement import Placement
from splitwiser_lab.pipelines.team import SLOTS, Team
from splitwiser_lab.shared_memory import DeviceHandle

LAYOUT = KVLayout(((2, 8, 8),), torch.bfloat16)


class FakeChild:
    """Remembers how it was started and what it was sent; it is ready at once."""

    made: list[FakeChild]

    def __init__(self, who: str, module: str, inherited: Sequence[int], share: MpsShare | None) -> None:
        self.who, self.inherited, self.share, self.pid = who, list(inherited), share, 1
        self.sent: list[Any] = []
        self.connection, theirs = Pipe()
        theirs.send(None)
        self._theirs = theirs
        FakeChild.made.append(self)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def let_go(self) -> None:
        pass

    def end(self) -> None:
        self.connection.close()


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Memory that was asked for, as (bytes, device); its handle is one of CUDA IPC."""
    asked: list[tuple[int, str]] = []

    def allocate(nbytes: int, device: str) -> SimpleNamespace:
        asked.append((nbytes, device))
        return SimpleNamespace(export=lambda: DeviceHandle(b"slots", 0))

    FakeChild.made = []
    monkeypatch.setattr(team, "Child", FakeChild)
    monkeypatch.setattr(team, "allocate", allocate)
    monkeypatch.setattr(team, "daemon_for", lambda index: SimpleNamespace(gpu=index))
    return asked


def started(mode: str, device: str, **options: Any) -> list[tuple[FakeChild, Setup]]:
    model = SimpleNamespace(inherited=[], skeleton=lambda: "skeleton")
    Team(Placement.of(mode, **options), model, LAYOUT, device, 128).close()
    return [(child, child.sent[0]) for child in FakeChild.made]


def test_slots_on_a_gpu_travel_by_handle(allocated: list[tuple[int, str]]) -> None:
    children = started("split", "cuda:1")
    assert allocated == [(SLOTS * 128, "cuda:1")]
    for child, setup in children:
        assert setup.slots is not None and setup.slots.handle == DeviceHandle(b"slots", 0)
        assert (setup.slots.count, setup.slots.slot_bytes) == (SLOTS, 128)
        assert child.inherited == [] and child.share is None, "a handle is no file descriptor"
        assert setup.device == "cuda:1" and setup.mps_share is None


def test_a_client_of_mps_sees_one_gpu_and_is_told_to_insist_on_mps(allocated: list[tuple[int, str]]) -> None:
    children = started("split", "cuda:1", mps=True, sm_shares=[75, 25])
    assert [child.share.percent for child, _ in children] == [75, 25]
    assert all(child.share.daemon.gpu == 1 for child, _ in children)
    assert [(setup.device, setup.mps_share) for _, setup in children] == [("cuda:0", 75), ("cuda:0", 25)]


def test_replicas_have_no_slots(allocated: list[tuple[int, str]]) -> None:
    children = started("replicas", "cuda:0", processes=4)
    assert not allocated and len(children) == 4 and all(setup.slots is None for _, setup in children)
