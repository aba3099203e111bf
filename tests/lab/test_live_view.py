"""The live view: few points, small messages, nothing hidden, the same traces in every frame."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import plotly.graph_objects as go
import pytest

from splitwiser_lab.lab import display
from splitwiser_lab.lab.dashboard import figure, numbers, series, show
from splitwiser_lab.lab.dashboard.frame import Frame, Line, Part, TokenLine
from splitwiser_lab.lab.dashboard.picture import picture
from splitwiser_lab.lab.palette import PHASE_COLOURS, PHASE_LABELS
from splitwiser_lab.measure.sources import Sample
from splitwiser_lab.measure.stretch import Stretch
from splitwiser_lab.timeline import RequestRecord, Span, Timeline

LINES = tuple(Line(f"core_{n}", f"core {n}") for n in range(4))
MOST_BYTES = 60_000


def busy_frame(seconds: float = 20.0, step_s: float = 0.0015, **changes: Any) -> Frame:
    """A fast machine: steps of 1.5 ms on one lane, prefills on another, hundreds of requests, a flip every 4 s."""
    steps = int(seconds / step_s)
    decode = [Span("decode", "decode", i * step_s, (i + 0.9) * step_s, 0, 32, 32, "streams") for i in range(steps)]
    prefill = [
        Span("prefill", "prefill", i / 20, (i + 0.8) / 20, 2048, 0, 1, "streams") for i in range(int(20 * seconds))
    ]
    requests = tuple(
        RequestRecord(i, 2048, i / 20, tuple(i / 20 + 0.04 + step_s * t for t in range(64)), i / 20, i / 20 + 0.04)
        for i in range(int(20 * seconds) - 2)
    )
    spans = tuple(sorted([*decode, *prefill], key=lambda span: span.end))
    readings = tuple(Sample(t, {line.key: 37.123456 for line in LINES}) for t in np.arange(0, seconds, 0.05))
    kv = tuple((t, 0.123456) for t in np.arange(0, seconds, 0.01))
    timeline = Timeline(spans, requests)
    labels = ["sequential", "chunked (chunk_tokens=256)", "partitioned (decode_sms=64)", "processes", "streams"]
    parts = tuple(
        Part(label, 4.0 * n, min(seconds, 4.0 * (n + 1)), timeline, readings, kv)
        for n, label in enumerate(labels)
        if 4.0 * n < seconds
    )
    before, after = (
        Stretch.of(timeline, label, start, start + 4) for label, start in (("processes", 12.0), ("streams", 16.0))
    )
    values: dict[str, Any] = {
        **{"now": seconds, "window": seconds, "parts": parts, "before": before, "after": after, "lines": LINES},
        **{"tokens": TokenLine(True, "identical: all."), "state": "running", "message": "", "recorded": False},
        "heading": "Live: a model on a machine",
    }
    return Frame(**{**values, **changes})


@pytest.fixture(scope="module")
def frame() -> Frame:
    return busy_frame()


EMPTY = Frame(0.0, 20.0, (), None, None, TokenLine(None, "no request yet."), "ready", "", "Live", False, LINES)


class TestSeries:
    def test_no_trace_has_more_than_300_points(self, frame: Frame):
        traces = figure.change(frame).traces
        assert max(len(trace["x"]) for trace in traces) <= series.MOST_POINTS
        assert min(len(trace["x"]) for trace in traces[: len(LINES) + 5]) > 20

    def test_a_message_is_small(self, frame: Frame):
        new = figure.change(frame)
        assert len(json.dumps(new.traces)) + len(json.dumps(new.layout)) < MOST_BYTES
        assert len(picture(frame)) < MOST_BYTES

    def test_rates_are_those_of_the_batches(self, frame: Frame):
        for phase, wanted in (("prefill", 2048 * 20), ("decode", 32 / 0.0015)):
            _, values = series.rate(frame, phase)
            assert np.mean(values) == pytest.approx(wanted, rel=0.05)

    def test_a_stall_is_never_thinned_away(self, frame: Frame):
        timeline = frame.parts[0].timeline
        stalled = replace(timeline.requests[200], token_times=(10.0, 10.7))
        parts = tuple(
            replace(p, timeline=replace(timeline, requests=(*timeline.requests, stalled))) for p in frame.parts
        )
        assert max(series.gaps(replace(frame, parts=parts))[1]) == pytest.approx(700)

    def test_p99_looks_back_three_seconds_and_has_gaps_where_nothing_came(self):
        tokens = tuple(1 + i / 100 for i in range(100))
        timeline = Timeline((), (RequestRecord(0, 9, 0.0, tokens),))
        x, y = series.p99(replace(EMPTY, now=20.0, parts=(Part("a", 0.0, 20.0, timeline),)))
        known = [t for t, value in zip(x, y, strict=True) if value is not None]
        assert min(known) > 1 and max(known) < 2 + 3.01 and None in y
        assert next(value for value in y if value is not None) == pytest.approx(10)

    def test_lanes_are_shown_as_closely_as_their_batches_need(self, frame: Frame):
        slow = busy_frame(20.0, step_s=0.5)
        assert series.zoom(frame) < series.zoom(slow) <= slow.window

    def test_a_batch_cut_by_a_flip_counts_only_until_it(self):
        timeline = Timeline((Span("main", "prefill", 0.0, 2.0, 100, 0, 1, "a"),), ())
        cut = replace(EMPTY, now=10.0, parts=(Part("a", 0.0, 1.0, timeline), Part("b", 1.0, 10.0, Timeline((), ()))))
        assert sum(v or 0 for v in series.rate(cut, "prefill")[1]) * cut.window / 80 == pytest.approx(50)


class TestFigure:
    @pytest.mark.parametrize("kind", [go.Figure, go.FigureWidget])
    def test_takes_every_frame_with_the_same_traces_and_shapes(self, frame: Frame, kind: Any):
        picture = figure.build(kind, LINES)
        before = (len(picture.data), len(picture.layout.shapes), len(picture.layout.annotations))
        for one in (EMPTY, frame, busy_frame(6.0), EMPTY):
            figure.apply(picture, figure.change(one))
            assert (len(picture.data), len(picture.layout.shapes), len(picture.layout.annotations)) == before

    def test_marks_each_flip_and_names_the_mode(self, frame: Frame):
        picture = figure.build(go.Figure, LINES)
        figure.apply(picture, figure.change(frame))
        marks = {shape.x0 for shape in picture.layout.shapes if shape.visible}
        assert marks >= {4.0, 8.0, 12.0, 16.0}
        shown = {a.text for a in picture.layout.annotations if a.visible is not False}
        assert {"streams", "processes"} <= shown
        figure.apply(picture, figure.change(EMPTY))
        assert not any(shape.visible for shape in picture.layout.shapes)

    def test_phases_have_their_colours(self, frame: Frame):
        picture = figure.build(go.Figure, LINES)
        figure.apply(picture, figure.change(frame))
        bars = {trace.name: trace.marker.color for trace in picture.data if isinstance(trace, go.Bar)}
        assert bars == {PHASE_LABELS[phase]: colour for phase, colour in PHASE_COLOURS.items()}
        lines = {trace.name: trace.line.color for trace in picture.data if isinstance(trace, go.Scatter)}
        assert lines["prefill"] == PHASE_COLOURS["prefill"] and lines["decode"] == PHASE_COLOURS["decode"]

    def test_lanes_are_rows_with_their_names(self, frame: Frame):
        layout = figure.change(frame).layout
        assert sorted(layout["yaxis6"]["ticktext"]) == ["decode", "hand-off", "prefill"]

    @pytest.mark.parametrize("values", [[], [0.0], [3.0], [1.5, 900.0]])
    def test_the_logarithmic_range_holds_all_values(self, values: list[float]):
        low, high = figure.log_range(values)
        assert low < high and all(10**low <= value <= 10**high for value in values if value > 0)


class TestNumbers:
    def test_before_and_after_and_how_they_compare(self, frame: Frame):
        head, before, after, ratio = numbers.rows(frame)
        assert before[0].startswith("before: processes") and after[0].startswith("since: streams")
        assert (
            ratio[head.index("output tok/s")]
            == f"×{frame.after.output_tokens_per_s / frame.before.output_tokens_per_s:.2f}"
        )
        assert len({len(head), len(before), len(after), len(ratio)}) == 1

    def test_better_means_less_time_or_more_tokens(self, frame: Frame):
        before = replace(frame.before, completed=3)
        slower = replace(frame.after, ttft_ms=frame.before.ttft_ms * 2, output_tokens_per_s=9e9, completed=3)
        changed = replace(frame, before=before, after=slower)
        assert numbers.better(changed, 0) is False and numbers.better(changed, 4) is True
        assert numbers.better(replace(changed, after=before), 0) is None
        assert "worse" in numbers.html(changed) and "better" in numbers.html(changed)

    def test_two_requests_are_too_few_to_call_anything_better(self, frame: Frame):
        before = replace(frame.before, completed=9)
        hardly = replace(frame.after, ttft_ms=frame.before.ttft_ms * 2, completed=2)
        assert numbers.better(replace(frame, before=before, after=hardly), 0) is None

    @pytest.mark.parametrize(("holds", "sign"), [(True, "✓"), (False, "✗"), (None, "…")])
    def test_the_token_line_has_a_sign_and_words(self, frame: Frame, holds: bool | None, sign: str):
        told = replace(frame, tokens=TokenLine(holds, "NOT <b>"))
        assert sign in numbers.html(told) and "NOT &lt;b&gt;" in numbers.html(told)
        assert sign in picture(told) and f'data-holds="{holds}"' in numbers.html(told)

    def test_what_is_recorded_says_so_everywhere(self, frame: Frame):
        recorded = replace(frame, recorded=True)
        for said in (numbers.html(recorded), numbers.said(recorded), picture(recorded)):
            assert "RECORDED" in said
        assert "RECORDED" not in numbers.html(frame) + numbers.said(frame) + picture(frame)


class TestPicture:
    @pytest.mark.parametrize("which", [EMPTY, busy_frame(6.0), busy_frame(20.0, 0.4)], ids=["empty", "fast", "slow"])
    def test_is_well_formed_and_says_what_it_shows(self, which: Frame):
        root = ElementTree.fromstring(picture(which))
        described = root.find("{http://www.w3.org/2000/svg}desc")
        assert described is not None and which.tokens.text in (described.text or "")

    def test_four_long_names_stand_below_their_panel_and_leave_each_other_alone(self, frame: Frame):
        names = ["SMs at work", "tensor cores at work", "memory bandwidth", "GPU busy (any kernel)"]
        lines = tuple(Line(f"core_{n}", name) for n, name in enumerate(names))
        root = ElementTree.fromstring(picture(replace(frame, lines=lines)))
        texts = {text.text: text for text in root.iter("{http://www.w3.org/2000/svg}text")}
        places = [(float(texts[n].get("y")), float(texts[n].get("x")), n) for n in names]
        above, below = (float(texts[title].get("y")) for title in ("hardware (%)", "ITL, gap between tokens (ms)"))
        for y, x, name in places:
            assert above + 100 < y < below - 10
            assert not [n for top, left, n in places if top == y and x < left < x + 5 * len(name)]

    def test_a_long_line_about_the_tokens_is_said_to_its_end(self, frame: Frame):
        said = "NOT identical: " + "some of the requests differ from the reference, " * 4 + "as far as it ran."
        root = ElementTree.fromstring(picture(replace(frame, tokens=TokenLine(False, said))))
        whole = " ".join("".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text"))
        assert said in whole

    def test_nothing_is_drawn_outside(self, frame: Frame):
        root = ElementTree.fromstring(picture(frame))
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        for box in root.iter("{http://www.w3.org/2000/svg}rect"):
            assert float(box.get("x")) >= 0 and float(box.get("x")) + float(box.get("width")) <= width
            assert 0 <= float(box.get("y")) <= height


class TestWhoDraws:
    @pytest.fixture(autouse=True)
    def in_a_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("SPLITWISER_LAB_STATIC", "COLAB_RELEASE_TAG", "JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(display, "in_kernel", lambda: True)

    @pytest.mark.parametrize(
        ("sign", "drawing"),
        [
            ("JPY_SESSION_NAME", "task"),
            ("VSCODE_PID", "task"),
            ("COLAB_RELEASE_TAG", "cell with controls"),
            ("NOTHING", "cell"),
        ],
    )
    def test_the_front_end_decides_and_the_reason_is_told(self, monkeypatch: Any, sign: str, drawing: str):
        monkeypatch.setenv(sign, "1")
        choice = show.choose_drawing()
        assert choice.value == drawing and choice.reason

    def test_without_a_live_figure_the_cell_draws(self, monkeypatch: Any):
        def no_widget() -> None:
            raise ImportError("Please install anywidget")

        monkeypatch.setenv("JPY_SESSION_NAME", "1")
        monkeypatch.setattr(go, "FigureWidget", no_widget)
        choice = show.choose_drawing()
        assert choice.value == "cell with controls" and "anywidget" in choice.reason
