"""Charts are well-formed in both forms; predictions come before measurements; roofs and sliders are in place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

from splitwiser_lab import Engine
from splitwiser_lab.lab import views
from splitwiser_lab.lab.chart import Chart, Series, chart_figure, chart_svg, log_ticks, si
from splitwiser_lab.lab.palette import PHASE_COLOURS
from splitwiser_lab.measure.profile import profile_phases
from splitwiser_lab.predict.ceilings import Ceilings
from splitwiser_lab.predict.kernels import Kernels

SVG = "{http://www.w3.org/2000/svg}"
KERNELS = Kernels(
    Ceilings("a test's CPU", "float32", 2e11, 3e10, "a test"), ((1, 1e-9), (64, 8e-9)), 1e9, 1e-9, 1e-5, 1e-5, False
)
CHART = Chart(
    "A <title>",
    "x & more",
    "y",
    (
        Series("roof", "#009E73", ((0.25, 10.0), (8.0, 320.0), (4000.0, 320.0)), "solid", label="<here>"),
        Series("guessed", "#E69F00", ((2.0, 50.0), (100.0, 300.0)), "none", "hollow", notes=("one & only", "two")),
    ),
    "What is seen & heard",
)


class TestChart:
    def test_the_svg_is_well_formed_and_says_what_it_shows(self):
        root = ElementTree.fromstring(chart_svg(CHART))
        assert root.find(f"{SVG}title").text == "A <title>" and root.find(f"{SVG}desc").text == "What is seen & heard"
        notes = [mark.find(f"{SVG}title").text for mark in root.iter(f"{SVG}circle") if len(mark)]
        assert notes == ["one & only", "two"]

    def test_everything_lies_inside_and_up_means_more(self):
        root = ElementTree.fromstring(chart_svg(CHART))
        _, _, width, height = map(float, root.get("viewBox").split())
        marks = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle") if len(c)]
        assert all(0 < x < width and 0 < y < height for x, y in marks)
        (left, low), (right, high) = marks
        assert left < right and low > high

    def test_both_forms_draw_the_same_points_in_the_same_colours(self):
        roof, guessed = chart_figure(CHART).data
        assert list(zip(roof.x, roof.y, strict=True)) == list(CHART.series[0].points)
        assert roof.text[-1] == "<here>" and roof.mode == "lines+text"
        assert guessed.mode == "markers" and guessed.marker.symbol == "circle-open"
        assert guessed.marker.color == "#E69F00" and list(guessed.text) == ["one & only", "two"]

    def test_a_chart_without_points_is_refused(self):
        with pytest.raises(ValueError, match="no point"):
            chart_svg(Chart("", "", "", (Series("", "#000", ()),), ""))

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0"), (34.2e9, "34.2 G"), (512, "512"), (1500, "1.5 k"), (2e-5, "20 µ"), (6.7e13, "67 T")],
    )
    def test_numbers_read_well(self, value: float, text: str):
        assert si(value) == text

    @pytest.mark.parametrize(("low", "high"), [(0.2, 5000.0), (20.0, 900.0), (1e9, 1e15), (1e-6, 1e12)])
    def test_ticks_are_few_and_inside(self, low: float, high: float):
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 10 and low <= ticks[0] and ticks[-1] <= high


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Callable[[], Any]]]:
    """What the views show, in order; kernels are made up, so that nothing is timed."""
    pictures: list[tuple[str, Callable[[], Any]]] = []
    monkeypatch.setattr(views.Redrawn, "show", lambda self, svg, figure=None: pictures.append((svg, figure)))
    monkeypatch.setattr(views, "_kernels", lambda *_: KERNELS)
    return pictures


def legend(figure: Any) -> list[str]:
    return [trace.name for trace in figure.data if trace.showlegend is not False]


class TestProfile:
    def test_the_prediction_is_drawn_first_and_stays(self, engine: Engine, shown: list[Any]):
        found = views.profile(engine, (16, 40), (1,), new_tokens=4, repeats=1)
        (before, first), (after, last) = shown
        assert first is None, "JupyterLab would keep that figure"
        assert "predictions only" in before and "measured" in after
        assert legend(last()) == ["prefill, measured", "prefill, predicted", "decode, measured", "decode, predicted"]
        predicted = re.findall("<title>([^<]*: predicted [^<]*)</title>", before)
        assert len(predicted) == 4 and all(note in after for note in predicted)
        assert predicted == [note for trace in last().data if "predicted" in trace.name for note in trace.text]
        assert tuple(last().data[0].y) == tuple(t.tokens_per_s for t in found.of("prefill"))

    def test_phases_have_their_colours(self, engine: Engine, shown: list[Any]):
        views.profile(engine, (16,), (1,), new_tokens=4, repeats=1)
        for trace in shown[-1][1]().data:
            assert trace.marker.color == PHASE_COLOURS[trace.name.split(",")[0]]


class TestRoofline:
    def test_without_a_profile_there_are_only_predictions(self, engine: Engine, shown: list[Any]):
        views.roofline(engine)
        svg, _ = shown[0]
        assert "predicted" in svg and "measured" not in svg
        assert "200 GFLOP/s" in svg and "H100, H200" in svg

    def test_a_profile_adds_what_was_measured(self, engine: Engine, shown: list[Any]):
        found = profile_phases(engine, (16, 40), (1,), new_tokens=4, repeats=1, kernels=KERNELS)
        views.roofline(engine, found)
        traces = {trace.name: trace for trace in shown[0][1]().data}
        assert tuple(traces["decode, measured"].y) == tuple(t.flops_per_s for t in found.of("decode"))
        assert tuple(traces["decode, measured"].x) == tuple(t.work.intensity for t in found.of("decode"))

    def test_each_slider_moves_the_mark_of_its_phase(self, engine: Engine, shown: list[Any]):
        views.roofline(engine)
        figure = shown[0][1]()
        for slider, phase in zip(figure.layout.sliders, ("prefill", "decode"), strict=True):
            for step in slider.steps:
                change, (number,) = step.args
                assert figure.data[number].name == f"{phase}, by slider"
                assert change["text"][0][0].startswith(phase)
            now = slider.steps[slider.active].args[0]
            assert list(figure.data[number].x) == now["x"][0]
