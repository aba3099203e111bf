"""The Gantt says what the timeline says: every span a bar, every phase its colour, every mark in place."""

from __future__ import annotations

from collections import Counter

import pytest
import runs_to_draw
from runs_to_draw import bars_of, notes, steps, traces

from splitwiser_lab.lab import plots
from splitwiser_lab.lab.palette import PHASE_COLOURS, PHASE_LABELS
from splitwiser_lab.timeline import ModeChange, SpanPhase, Timeline


@pytest.fixture
def processes() -> Timeline:
    return runs_to_draw.processes()


@pytest.fixture
def flipped() -> Timeline:
    return runs_to_draw.flipped()


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
