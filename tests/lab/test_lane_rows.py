"""Lanes stand in the same order in every drawing, and a change of mode is named by what runs from then on."""

from __future__ import annotations

import re
from dataclasses import replace

import plotly.graph_objects as go
import pytest
from runs_to_draw import processes, span

from splitwiser_lab.lab import plots
from splitwiser_lab.lab.lane_rows import lane_order
from splitwiser_lab.lab.static import gantt_svg
from splitwiser_lab.timeline import ModeChange, Timeline

ROWS = ["main", "prefill", "decode"]


@pytest.fixture
def auto() -> Timeline:
    """Decode's lane is used first; what `auto` chooses follows closely upon its first choice, then lasts."""
    spans = (span("decode", "decode", 0.0, 0.1), span("prefill", "prefill", 0.1, 0.3), span("main", "mixed", 0.3, 1.0))
    long = "partitioned (decode_sms=64)"
    modes = (ModeChange(0.0, "auto", runs="sequential"), *(ModeChange(t, "auto", runs=long) for t in (0.2, 0.4)))
    return replace(processes(), spans=spans, modes=modes)


def test_rows_have_one_order_whichever_lane_began(auto: Timeline) -> None:
    assert lane_order(auto.lanes) == ROWS and lane_order(["process 1", "process 0"]) == ["process 0", "process 1"]
    drawn = [text for text in re.findall(r">([a-z ]+)</text>", gantt_svg({"auto": auto})) if text in ROWS]
    assert drawn[-3:] == ROWS
    figure: go.Figure = plots.gantt(auto)
    assert list(figure.layout.yaxis.ticktext)[:3] == ROWS
    [mixed] = [bar for bar in figure.data if isinstance(bar, go.Bar) and bar.name.startswith("mixed")]
    assert list(mixed.y) == [0], "the main lane is the first row"


def test_auto_is_named_by_its_choices_shortened_where_the_next_comes_soon(auto: Timeline) -> None:
    svg = gantt_svg({"a": auto})
    names = re.findall(r'font-style="italic">([^<]+)<', svg)
    assert names == ["sequential", "partitioned", "partitioned (decode_sms=64)"]
    [change] = [trace for trace in plots.gantt(auto).data if trace.name == "mode change"]
    assert "sequential" in change.text and "auto" not in change.text
