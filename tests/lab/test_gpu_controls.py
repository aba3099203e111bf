"""What the live lab offers and draws on a GPU: shares that the lanes accept, and the GPU's own counters."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import plotly.graph_objects as go
import pytest
from conftest import MakeEngine
from fake_nvml import FakeNvml
from tiny_models import tiny

from splitwiser_lab.engine.modes import MODES
from splitwiser_lab.engine.scheduler import DEFAULT_LIMITS
from splitwiser_lab.errors import ModeError
from splitwiser_lab.lab.dashboard import figure, series, shares
from splitwiser_lab.lab.dashboard.knobs import Settings, knobs_of
from splitwiser_lab.lab.dashboard.picture import picture
from splitwiser_lab.lab.dashboard.session import Session
from splitwiser_lab.lab.dashboard.shares import share_option
from splitwiser_lab.lab.dashboard.source import Knob
from splitwiser_lab.lanes import support
from splitwiser_lab.lanes.mps import DEFAULT_SHARES
from splitwiser_lab.lanes.partition import SmGrid
from splitwiser_lab.measure import monitor
from splitwiser_lab.measure.sources_cpu import CpuSource
from splitwiser_lab.measure.sources_gpm import GpmSource
from splitwiser_lab.measure.sources_nvml import NvmlDevice, NvmlSource

GPU = "cuda:0"
UseGrid = Callable[[SmGrid], None]


@pytest.fixture
def use_grid(monkeypatch: pytest.MonkeyPatch) -> UseGrid:
    """Makes GPU 0 one that is divided by this grid."""

    def use(grid: SmGrid) -> None:
        for module in (shares, support):
            monkeypatch.setattr(module, "grid_of", lambda device: grid)
        monkeypatch.setattr(shares, "no_partition", lambda device: None)

    return use


def share(mode: str, **options: int) -> Knob:
    """The control for the share as it stands on a GPU."""
    engine = SimpleNamespace(device=GPU, limits=DEFAULT_LIMITS["cuda"], longest_request=4096)
    return next(knob for knob in knobs_of(Settings(mode, options), engine, False) if knob.name == shares.SHARE)


class TestShare:
    @pytest.mark.parametrize(
        ("grid", "first", "last", "usual"), [(SmGrid(132, 8, 8), 8, 120, 64), (SmGrid(40, 2, 2), 2, 38, 20)]
    )
    def test_of_partitioned_is_every_number_of_sms_that_the_lanes_accept(
        self, use_grid: UseGrid, grid: SmGrid, first: int, last: int, usual: int
    ):
        use_grid(grid)
        knob = share("partitioned")
        offered = [value for _, value in knob.choices]
        assert (offered[0], offered[-1], knob.value, knob.why_not) == (first, last, usual, "")
        assert knob.choices[0][0] == f"{first} SMs"
        for sms in offered:
            MODES["partitioned"].check({"decode_sms": sms}, GPU)
        with pytest.raises(ModeError):
            MODES["partitioned"].check({"decode_sms": last + grid.step}, GPU)
        assert share("partitioned", decode_sms=first).value == first

    def test_of_mps_is_in_per_cent_and_stands_at_what_the_lane_gets_unasked(self, use_grid: UseGrid):
        use_grid(SmGrid(132, 8, 8))
        knob = share("mps")
        assert knob.value == DEFAULT_SHARES["decode"] and not knob.why_not
        assert all(text == f"{value} %" and 1 <= value <= 100 for text, value in knob.choices)
        assert share("mps", decode_share=40).value == 40

    @pytest.mark.parametrize("mode", ["sequential", "chunked", "streams", "processes", "auto"])
    def test_is_grey_with_a_reason_in_modes_that_share_nothing_out(self, use_grid: UseGrid, mode: str):
        use_grid(SmGrid(132, 8, 8))
        assert mode in share(mode).why_not and share_option(mode, GPU) is None

    def test_needs_no_green_contexts_where_there_are_none(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(shares, "no_partition", lambda device: "this driver is too old")
        assert share("sequential").why_not and share("mps").value == DEFAULT_SHARES["decode"]

    def test_that_leaves_no_choice_is_grey(self, use_grid: UseGrid):
        use_grid(SmGrid(16, 8, 8))
        assert share("partitioned").why_not == "this machine can be divided in one way only"

    @pytest.mark.parametrize(("mode", "options"), [("partitioned", {"decode_sms": 48}), ("mps", {"decode_share": 40})])
    def test_that_is_turned_is_wished_for_by_the_mode_s_own_name(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, mode: str, options: dict[str, int]
    ):
        engine = make_engine()
        session = Session(engine, reference=tiny("llama"))
        wished: list[Settings] = []
        monkeypatch.setattr(session._flips, "wish", wished.append)
        monkeypatch.setattr(engine, "device", GPU)
        session._flips.settings = replace(session.settings, mode=mode)
        session.turn(shares.SHARE, *options.values())
        assert [settings.options for settings in wished] == [options]
        session.close()


def test_the_gpu_s_counters_are_read_and_drawn(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(pids=(os.getpid(),))
    monkeypatch.setattr(monitor, "open_sources", lambda device: sources(nvml))
    session = Session(make_engine(), reference=tiny("llama"))
    named = {line.key: line.label for line in session.frame().lines}
    assert named == {
        "sm": "SMs at work",
        "tensor": "tensor cores at work",
        "dram": "memory bandwidth",
        "occupancy": "SM occupancy (warps)",
    }
    session.start()
    frame = after_readings(session, "sm")
    session.close()
    for key, value in (("sm", 61.0), ("tensor", 40.25), ("dram", 88.0), ("occupancy", 23.5)):
        assert {v for v in series.hardware(frame, key)[1] if v is not None} == {value}
    drawn = figure.build(go.Figure, frame.lines)
    figure.apply(drawn, figure.change(frame))
    assert {61.0, 40.25, 88.0, 23.5} == {trace.y[-1] for trace in drawn.data[:4]}
    assert all(label in picture(frame) for label in named.values())


def test_a_gpu_without_counters_has_what_the_driver_tells(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "open_sources", lambda device: sources(FakeNvml(gpm=False)))
    session = Session(make_engine(), reference=tiny("llama"))
    assert [line.label for line in session.frame().lines] == ["GPU busy (any kernel)"]
    session.close()


def sources(nvml: FakeNvml) -> list[Any]:
    gpu = NvmlDevice(nvml, "GPU-1")
    return [GpmSource(gpu), NvmlSource(gpu), CpuSource(only_load=True)]


def after_readings(session: Session, key: str) -> Any:
    """The first frame in which two readings of this metric are plotted."""
    deadline = time.monotonic() + 60
    while True:
        frame = session.frame()
        if len([v for v in series.hardware(frame, key)[1] if v is not None]) >= 2:
            return frame
        assert time.monotonic() < deadline, f"{frame.state}: {frame.message}"
        time.sleep(0.05)
