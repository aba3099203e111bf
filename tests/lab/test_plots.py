"""The pictures say what the timeline says: every span a bar, every phase its colour, every mark in place."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest

from splitwiser_lab.lab import plots
from splitwiser_lab.lab.static import GREY, PHASE_COLOURS, PHASE_LABELS, gantt_svg, thinned, ticks
from splitwiser_lab.timeline import ModeChange, RequestRecord, Span, SpanPhase, Timeline

SVG = "{http://www.w3.org/2000/svg}"


def span(lane: str, phase: SpanPhase, start: float, end: float, mode: str = "processes") -> Span:
    return Span(lane, phase, start, end, 128 if phase != "decode" else 0, 3 if phase != "prefill" else 0, 3, mode)


@pytest.fixture
def processes() -> Timeline:
    """Two lanes that overlap, two requests, one of them preempted once; 0.5 s."""
    return Timeline(
        spans=(
            span("prefill", "prefill", 0.0, 0.2),
            span("decode", "decode", 0.2, 0.25),
            span("decode", "decode", 0.25, 0.31),
            span("prefill", "prefill", 0.2, 0.4),
            span("decode", "mixed", 0.4, 0.5),
        ),
        requests=(
            RequestRecord(0, 128, 0.0, (0.2, 0.25, 0.31), 0.0, 0.21, 0.31, "length"),
            RequestRecord(1, 128, 0.1, (0.4, 0.5), 0.2, 0.45, 0.5, "stop", preemptions=1),
        ),
        modes=(ModeChange(0.0, "processes"),),
    )


@pytest.fixture
def flipped(processes: Timeline) -> Timeline:
    modes = (ModeChange(0.0, "sequential"), ModeChange(0.2, "chunked", {"chunk_tokens": 64}))
    return Timeline(processes.spans, processes.requests, modes)


def steps(count: int, lane: str = "main", ms: float = 10.0) -> Timeline:
    """Decode steps in a row, every tenth a prefill."""
    phases: list[SpanPhase] = ["prefill" if i % 10 == 0 else "decode" for i in range(count)]
    spans = tuple(span(lane, phase, i * ms / 1e3, (i + 0.95) * ms / 1e3) for i, phase in enumerate(phases))
    tokens = tuple(s.end for s in spans)
    return Timeline(spans, tuple(RequestRecord(i, 9, 0.0, (t,), 0.0, t, t, "stop") for i, t in enumerate(tokens)))


def traces(figure: go.Figure, name: str) -> list[go.Bar | go.Scatter]:
    return [trace for trace in figure.data if trace.name == name]


def bars_of(figure: go.Figure) -> list[go.Bar]:
    return [trace for trace in figure.data if isinstance(trace, go.Bar)]


def notes(figure: go.Figure) -> str:
    return " ".join(annotation.text for annotation in figure.layout.annotations)


def test_gantt_leaves_no_room_for_marks_of_requests_that_are_not_there(processes: Timeline) -> None:
    by_hand = Timeline(processes.spans, ())
    with_marks, without = plots.gantt(processes), plots.gantt(by_hand)
    assert list(without.layout.yaxis.ticktext) == ["prefill", "decode"]
    assert list(without.layout.yaxis.range) == [-1.6, 0.6]  # half a row and a bit around the two lanes, at 0 and -1
    assert without.layout.height < with_marks.layout.height


@pytest.mark.parametrize("phase", ["prefill", "decode", "mixed"])
def test_gantt_draws_each_span_as_a_bar_of_its_phase(processes: Timeline, phase: SpanPhase) -> None:
    (trace,) = traces(plots.gantt(processes), PHASE_LABELS[phase])
    spans = sorted((s for s in processes.spans if s.phase == phase), key=lambda s: s.start)
    assert list(trace.base) == [pytest.approx(s.start * 1e3) for s in spans]
    assert list(trace.x) == [pytest.approx(s.seconds * 1e3) for s in spans]
    assert trace.marker.color == PHASE_COLOURS[phase]
    assert trace.orientation == "h"


def test_gantt_has_a_labelled_row_per_lane(processes: Timeline) -> None:
    figure = plots.gantt(processes, title="A run")
    row_of = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    assert list(row_of) == ["prefill", "decode", "hand-off", "first token"]
    assert set(traces(figure, "prefill")[0].y) == {row_of["prefill"]}
    assert set(traces(figure, "decode")[0].y) == {row_of["decode"]}
    assert figure.layout.title.text == "A run"
    assert figure.layout.xaxis.title.text == "ms"
    assert list(figure.layout.xaxis.range) == [0, 500]


def test_gantt_hover_tells_tokens_sequences_and_time(processes: Timeline) -> None:
    (mixed,) = traces(plots.gantt(processes), PHASE_LABELS["mixed"])
    assert list(mixed.customdata[0]) == [
        "decode",
        "mixed · 100.00 ms · 128 prompt tokens · 3 decode tokens · 3 sequences",
    ]


def test_gantt_marks_hand_offs_first_tokens_and_preemption(processes: Timeline) -> None:
    figure = plots.gantt(processes)
    assert list(traces(figure, "hand-off")[0].x) == [pytest.approx(210)]
    assert list(traces(figure, "resumed")[0].x) == [pytest.approx(450)]
    assert "1 preemption(s)" in traces(figure, "resumed")[0].customdata[0]
    assert list(traces(figure, "first token")[0].x) == [pytest.approx(200), pytest.approx(400)]


def test_gantt_marks_a_change_of_mode_only_where_there_is_one(processes: Timeline, flipped: Timeline) -> None:
    assert traces(plots.gantt(processes), "mode change") == []
    (change,) = traces(plots.gantt(flipped), "mode change")
    assert [text for text in change.text if text] == ["sequential", "chunked"]
    assert change.x[3] == change.x[4] == pytest.approx(200)


def test_many_mode_changes_keep_their_lines_but_not_every_name(processes: Timeline) -> None:
    modes = tuple(ModeChange(i * 0.005, "chunked" if i % 2 else "sequential") for i in range(100))
    (change,) = traces(plots.gantt(Timeline(processes.spans, (), modes)), "mode change")
    assert len(change.x) == 300
    assert 2 <= len([text for text in change.text if text]) <= 8


def test_window_draws_what_touches_it(processes: Timeline) -> None:
    figure = plots.gantt(processes, window=(0.22, 0.3))
    assert sum(len(trace.x) for trace in bars_of(figure)) == 3  # two decode steps and the second prefill
    assert list(figure.layout.xaxis.range) == [pytest.approx(220), pytest.approx(300)]
    with pytest.raises(ValueError, match="positive length"):
        plots.gantt(processes, window=(0.3, 0.3))


def test_thousands_of_spans_are_thinned_and_a_note_says_so() -> None:
    figure = plots.gantt(steps(5000))
    assert len(bars_of(figure)) == 2  # one trace per phase, whatever their number
    drawn = sum(len(trace.x) for trace in bars_of(figure))
    assert 500 < drawn <= plots.MOST_BARS
    assert "are drawn as one bar per phase" in notes(figure)
    assert "one bar" not in notes(plots.gantt(steps(1000)))


def test_gantts_share_time_and_name_each_phase_once(processes: Timeline) -> None:
    figure = plots.gantts({"processes": processes, "sequential": steps(20)})
    assert "<b>processes</b>" in notes(figure)
    assert "<b>sequential</b>" in notes(figure)
    assert figure.layout.xaxis.matches == "x2" or figure.layout.xaxis2.matches == "x"
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range
    shown = Counter(trace.name for trace in figure.data if trace.showlegend)
    assert set(shown.values()) == {1}
    assert {trace.marker.color for trace in traces(figure, "decode")} == {PHASE_COLOURS["decode"]}
    with pytest.raises(ValueError, match="no timeline"):
        plots.gantts({})


def test_figures_suit_light_and_dark_pages(processes: Timeline) -> None:
    for figure in (plots.gantt(processes), plots.requests(processes), plots.itl({"a": processes})):
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
        assert figure.layout.font.color == GREY


def test_requests_shows_waiting_prefill_and_decode(processes: Timeline) -> None:
    cancelled = RequestRecord(2, 9, 0.3, (), None, None, 0.35, "cancelled")
    figure = plots.requests(Timeline(processes.spans, (*processes.requests, cancelled)))
    waiting, prefill, decode = bars_of(figure)
    assert list(waiting.x) == [pytest.approx(100), pytest.approx(50)]  # request 1, and the cancelled one
    assert list(prefill.base) == [0, pytest.approx(200)]
    assert list(prefill.x) == [pytest.approx(200), pytest.approx(200)]
    assert list(decode.x) == [pytest.approx(110), pytest.approx(100)]
    assert prefill.marker.color == PHASE_COLOURS["prefill"]
    assert decode.marker.color == PHASE_COLOURS["decode"]
    assert list(traces(figure, "did not complete")[0].x) == [pytest.approx(350)]
    assert list(traces(figure, "resumed")[0].x) == [pytest.approx(450)]


def test_an_unfinished_request_lasts_to_the_end_of_the_run(processes: Timeline) -> None:
    unfinished = RequestRecord(2, 9, 0.1, (0.3,), 0.2, 0.3)
    decode = bars_of(plots.requests(Timeline(processes.spans, (unfinished,))))[2]
    assert list(decode.x) == [pytest.approx(200)]  # 0.3 to 0.5


def test_requests_samples_evenly_and_says_so() -> None:
    figure = plots.requests(steps(1000))
    assert max(len(trace.y) for trace in bars_of(figure)) <= plots.MOST_REQUESTS
    assert "250 of 1000 requests are shown" in notes(figure)


def test_itl_is_a_cumulative_curve_per_mode(processes: Timeline) -> None:
    figure = plots.itl({"processes": processes, "empty": Timeline((), ())})
    (curve,) = figure.data
    assert curve.name == "processes: p50 60.0, p99 99.2, max 100.0 ms"  # gaps 50, 60, 100 ms
    assert (curve.x[0], curve.x[-1]) == (pytest.approx(50), pytest.approx(100))
    assert (curve.y[0], curve.y[-1]) == (0, 100)
    assert len(curve.x) <= 300
    assert figure.layout.xaxis.type == "log"
    assert curve.line.color not in PHASE_COLOURS.values()


def test_itl_keeps_tokens_that_arrived_together() -> None:
    record = RequestRecord(0, 1, 0.0, (1.0, 1.0, 1.0, 1.1), finish_reason="stop", finished=1.1)
    (curve,) = plots.itl({"a": Timeline((), (record,))}).data
    assert curve.name.startswith("a: p50 0.0, ")
    assert min(curve.x) > 0


def test_two_phases_compares_rates_over_step_sizes() -> None:
    rows = [
        {"phase": "prefill", "tokens": 512, "batch": 1, "ms": 100.0, "tokens_per_s": 5120.0},
        {"phase": "prefill", "tokens": 64, "batch": 1, "ms": 20.0, "tokens_per_s": 3200.0},
        {"phase": "decode", "tokens": 512, "batch": 8, "ms": 40.0, "tokens_per_s": 200.0},
        {"phase": "decode", "tokens": 2048, "batch": 8, "ms": 80.0, "tokens_per_s": 100.0},
    ]
    figure = plots.two_phases(rows)
    assert [trace.name for trace in figure.data] == ["prefill", "decode, context 512", "decode, context 2,048"]
    assert list(figure.data[0].x) == [64, 512]
    assert list(figure.data[0].y) == [3200.0, 5120.0]
    assert [trace.line.color for trace in figure.data] == [PHASE_COLOURS[p] for p in ("prefill", "decode", "decode")]


def test_empty_runs_still_draw() -> None:
    nothing = Timeline((), ())
    for figure in (plots.gantt(nothing), plots.requests(nothing), plots.itl({}), plots.two_phases([])):
        assert figure.to_json()
    assert "nothing ran" in gantt_svg({"sequential": nothing})


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


def test_thinning_keeps_time_and_tokens() -> None:
    timeline = steps(5000)
    bars, shortest = thinned(timeline.spans, 200)
    assert len(bars) <= 200 < 5000
    assert shortest > 0.01
    assert sum(bar.spans for bar in bars) == 5000
    assert sum(bar.decode_tokens for bar in bars) == sum(s.decode_tokens for s in timeline.spans)
    for phase in ("prefill", "decode"):
        drawn = sum(bar.ms for bar in bars if bar.phase == phase)
        assert drawn == pytest.approx(sum(s.seconds for s in timeline.spans if s.phase == phase) * 1e3, rel=0.05)


def test_few_spans_are_not_thinned(processes: Timeline) -> None:
    bars, shortest = thinned(processes.spans, 2000)
    assert (len(bars), shortest) == (5, 0.0)
    assert thinned((), 10) == ([], 0.0)
    assert len(thinned([span("a", "decode", 1.0, 1.0)] * 50, 10)[0]) == 1  # instants, all at once


def test_steps_longer_than_the_threshold_are_kept_apart_until_the_limit_asks() -> None:
    spans = [span("a", "decode", i, i + 1) for i in range(4)] + [
        span("a", "decode", 4 + i / 10, 4.09 + i / 10) for i in range(5)
    ]
    bars, shortest = thinned(spans, 100, shortest=0.5)
    assert [bar.spans for bar in bars] == [1, 1, 1, 1, 5]
    assert shortest == 0.5
    assert bars[-1].end == pytest.approx(4.49)


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
