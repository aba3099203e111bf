"""The static Gantt holds what the timeline holds, inside its page and its size."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

import pytest
import runs_to_draw
from runs_to_draw import steps

from splitwiser_lab.lab.palette import PHASE_COLOURS
from splitwiser_lab.lab.static import gantt_svg
from splitwiser_lab.lab.svg import ticks
from splitwiser_lab.timeline import Timeline

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def processes() -> Timeline:
    return runs_to_draw.processes()


@pytest.fixture
def flipped() -> Timeline:
    return runs_to_draw.flipped()


def rects(svg: str) -> Counter[str]:
    """Number of bars in the picture by the class of their group, which is the phase."""
    root = ElementTree.fromstring(svg)
    return Counter({p: len(root.findall(f".//{SVG}g[@class='{p}']/{SVG}rect")) for p in PHASE_COLOURS})


def test_svg_has_a_rect_per_span_in_its_phase_colour(processes: Timeline) -> None:
    svg = gantt_svg({"processes": processes})
    assert rects(svg) == {"prefill": 2, "decode": 2, "mixed": 1}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        assert group.get("fill") == PHASE_COLOURS[group.get("class")]  # type: ignore[index]
    assert "drawn as one bar" not in svg


def test_svg_names_what_it_shows(processes: Timeline, flipped: Timeline) -> None:
    root = ElementTree.fromstring(gantt_svg({"one <&> two": processes, "flipped": flipped}))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"one <&> two", "flipped", "prefill", "decode", "hand-off", "resumed", "first token", "ms"} <= set(texts)
    assert {"sequential", "chunked"} <= set(texts)
    assert "one <&> two" in root.findtext(f"{SVG}title", "")
    assert "one <&> two: 500 ms, prefill 80%, decode 22%, mixed 20%, prefill beside decode 22%" in root.findtext(
        f"{SVG}desc", ""
    )


def test_svg_places_bars_on_the_time_axis(processes: Timeline) -> None:
    root = ElementTree.fromstring(gantt_svg({"processes": processes}))
    first, second = root.findall(f".//{SVG}g[@class='prefill']/{SVG}rect")
    label = next(e for e in root.iter(f"{SVG}text") if e.text == "200")
    assert float(second.get("x", "")) == pytest.approx(float(label.get("x", "")), abs=0.2)
    assert float(first.get("width", "")) == pytest.approx(float(second.get("width", "")), abs=0.2)


def test_svg_of_long_runs_stays_small_and_says_what_was_merged() -> None:
    modes = ("sequential", "chunked", "streams", "partitioned", "processes", "mps", "auto")
    svg = gantt_svg({mode: steps(5000, lane=f"lane of {mode}") for mode in modes})
    assert len(svg.encode()) < 60_000
    assert "are drawn as one bar per phase" in svg
    assert 100 < sum(rects(svg).values()) <= 450
    assert len(gantt_svg({"sequential": steps(500)}).encode()) < 60_000


def test_svg_text_stays_inside_the_picture(flipped: Timeline) -> None:
    names = {"a-mode-with-a-very-long-name-" * 4: flipped, "b": steps(50, lane="a lane with a very long name " * 3)}
    for width in (400, 900):
        for element in ElementTree.fromstring(gantt_svg(names, width)).iter(f"{SVG}text"):
            length = 5.5 * len(element.text or "")
            before = {"start": 0.0, "middle": length / 2, "end": length}[element.get("text-anchor", "start")]
            assert float(element.get("x", "")) - before >= 0
            assert float(element.get("x", "")) - before + length <= width


def test_svg_refuses_what_cannot_be_drawn(processes: Timeline) -> None:
    with pytest.raises(ValueError, match="needs a timeline"):
        gantt_svg({})
    with pytest.raises(ValueError, match="400 pixels"):
        gantt_svg({"a": processes}, width=200)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (1654.0, [0, 500, 1000, 1500]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (0.35, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
    ],
)
def test_ticks_are_round(end: float, expected: list[float]) -> None:
    assert ticks(end) == expected
