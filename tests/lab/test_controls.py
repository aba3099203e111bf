"""The controls follow their source, and say why one of them does nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as widgets

from splitwiser_lab.hardware import ModeSupport
from splitwiser_lab.lab.dashboard.controls import Controls
from splitwiser_lab.lab.dashboard.source import Knob


class FakeSource:
    """Modes and knobs without anything behind them."""

    def __init__(self) -> None:
        self.modes = [
            ModeSupport("sequential", True, ""),
            ModeSupport("chunked", True, ""),
            ModeSupport("mps", False, "it shares a <GPU>"),
        ]
        self.mode, self.active = "sequential", False
        self.knobs = [
            Knob.of("rate", "arrival rate", (0.5, 1.0, 2.0), 1.0, "/s"),
            Knob.of("chunk_tokens", "chunk", (64, 128), 100, "tokens", "sequential has no chunks"),
        ]
        self.heard: list[Any] = []

    def choose(self, mode: str) -> None:
        self.heard.append(mode)
        self.mode = mode

    def turn(self, name: str, value: object) -> None:
        self.heard.append((name, value))

    def start(self) -> None:
        self.heard.append("start")
        self.active = True

    def stop(self) -> None:
        self.heard.append("stop")
        self.active = False


def find(box: widgets.Widget, kind: type[widgets.Widget]) -> list[Any]:
    found = [box] if isinstance(box, kind) else []
    return found + [each for child in getattr(box, "children", ()) for each in find(child, kind)]


class TestControls:
    def test_offer_what_runs_and_list_the_rest_with_its_reason(self):
        controls = Controls(FakeSource())
        [modes] = find(controls.box, widgets.ToggleButtons)
        assert list(modes.options) == ["sequential", "chunked"]
        told = "".join(html.value for html in find(controls.box, widgets.HTML))
        assert "mps" in told and "it shares a &lt;GPU&gt;" in told and "sequential has no chunks" in told

    def test_act_on_the_source(self):
        source = FakeSource()
        controls = Controls(source)
        [button], [modes] = find(controls.box, widgets.Button), find(controls.box, widgets.ToggleButtons)
        rate, chunk = find(controls.box, widgets.SelectionSlider)
        modes.value = "chunked"
        rate.value = 2.0
        button.click()
        assert source.heard == ["chunked", ("rate", 2.0), "start"] and button.description == "Stop"
        button.click()
        assert source.heard[-1] == "stop" and button.description == "Run"
        assert chunk.disabled and not rate.disabled and chunk.value == 100

    def test_follow_the_source_without_calling_it_back(self):
        source = FakeSource()
        controls = Controls(source)
        source.mode = "chunked"
        source.knobs = [
            replace(source.knobs[0], value=0.5),
            Knob.of("chunk_tokens", "chunk", (64, 128, 256), 256, "tokens"),
        ]
        controls.sync()
        [modes], (rate, chunk) = find(controls.box, widgets.ToggleButtons), find(controls.box, widgets.SelectionSlider)
        assert (modes.value, rate.value, chunk.value, chunk.disabled) == ("chunked", 0.5, 256, False)
        assert source.heard == []
