"""Requests, gaps and rates are drawn as the timeline has them."""

from __future__ import annotations

import pytest
import runs_to_draw
from runs_to_draw import bars_of, notes, steps, traces

from splitwiser_lab.lab import plots
from splitwiser_lab.lab.palette import INK, PAPER, PHASE_COLOURS
from splitwiser_lab.lab.static import gantt_svg
from splitwiser_lab.timeline import RequestRecord, Timeline


@pytest.fixture
def processes() -> Timeline:
    return runs_to_draw.processes()


def test_figures_suit_light_and_dark_pages(processes: Timeline) -> None:
    for figure in (plots.gantt(processes), plots.requests(processes), plots.itl({"a": processes})):
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == PAPER
        assert figure.layout.font.color == INK


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
