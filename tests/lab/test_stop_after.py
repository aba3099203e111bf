"""A view that runs on for a while and then leaves the machine to what comes next in the notebook."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from splitwiser_lab.hardware import Choice
from splitwiser_lab.lab.dashboard import show


class Source:
    """Prepares for so many frames, then runs until it is stopped; somebody may press Stop."""

    def __init__(self, preparing: int = 3, looks_until_pressed: int = 10**9) -> None:
        self._preparing, self._looks, self.stops, self._stopped = preparing, looks_until_pressed, 0, False

    @property
    def active(self) -> bool:
        self._looks -= 1
        return not self._stopped and self._looks > 0

    def frame(self) -> Any:
        self._preparing -= 1
        return SimpleNamespace(state="preparing" if self._preparing > 0 else "running")

    def stop(self) -> None:
        assert self._preparing <= 0, "the time in which it prepares does not count"
        self._stopped, self.stops = True, self.stops + 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "FRAMES_PER_S", 1000.0)


def stop_after(source: Source, seconds: float) -> None:
    asyncio.run(asyncio.wait_for(show.Dashboard(source, Choice("task", "")).stop_after(seconds), 30))


def test_it_stops_by_itself():
    stop_after(source := Source(), 0.02)
    assert source.stops == 1 and not source.active


def test_who_presses_stop_need_not_wait():
    stop_after(source := Source(looks_until_pressed=5), 10**6)  # would be over by now only if nobody looked
    assert not source.active


def test_nothing_is_left_to_wait_for_where_the_cell_has_drawn_it():
    stop_after(source := Source(preparing=0, looks_until_pressed=0), 10**6)
    assert not source.active
