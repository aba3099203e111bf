"""Metrics of hand-made timelines; every expected figure is worked out by hand beside it."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from splitwiser_lab.metrics import Metrics, busy_seconds, overlap_seconds, rate
from splitwiser_lab.timeline import FinishReason, RequestRecord, Span, SpanPhase, Timeline


def span(lane: str, phase: SpanPhase, start: float, end: float, prefill: int = 0, decode: int = 0) -> Span:
    return Span(lane, phase, start, end, prefill, decode, 1, "sequential")


def request(id: int, prompt: int, arrival: float, times: tuple[float, ...], reason: FinishReason) -> RequestRecord:
    return RequestRecord(id, prompt, arrival, times, finished=times[-1] if times else None, finish_reason=reason)


@pytest.fixture
def run() -> Timeline:
    """Three requests complete, one is cancelled, one refused, one fails, one is unfinished; it lasts 4 s."""
    return Timeline(
        spans=(
            span("prefill", "prefill", 0.0, 1.0, prefill=100),
            span("decode", "decode", 0.5, 1.5, decode=4),
            span("decode", "decode", 1.5, 2.0, decode=2),
            span("prefill", "prefill", 1.25, 1.75, prefill=50),
            span("decode", "mixed", 3.0, 4.0, prefill=20, decode=10),
        ),
        requests=(
            # TTFT 1.0, gaps 0.1 0.3 0.2, TPOT 0.6/3 = 0.2, E2EL 1.6
            request(0, 100, 0.0, (1.0, 1.1, 1.4, 1.6), "length"),
            # TTFT 0.5, gap 0.4, TPOT 0.4, E2EL 0.9
            request(1, 50, 1.0, (1.5, 1.9), "stop"),
            # TTFT 0.3, no gap, no TPOT, E2EL 0.3
            request(2, 20, 3.5, (3.8,), "length"),
            # none of these may count, long as its gaps are
            request(3, 999, 0.0, (2.0, 4.0), "cancelled"),
            request(4, 999, 0.0, (), "refused"),
            request(5, 999, 0.0, (3.0,), "error"),
            RequestRecord(6, 999, 3.9),
        ),
    )


def test_counts_and_throughputs(run: Timeline) -> None:
    m = Metrics.of(run)
    assert (m.completed, m.failed) == (3, 4)
    assert (m.cancelled, m.refused, m.errors, m.unfinished) == (1, 1, 1, 1)
    assert m.completed_share == pytest.approx(3 / 7)
    assert m.duration_s == 4.0
    assert m.total_input_tokens == 170  # 100 + 50 + 20
    assert m.total_output_tokens == 7  # 4 + 2 + 1
    assert m.request_throughput == 0.75  # 3 / 4 s
    assert m.output_throughput == 1.75  # 7 / 4 s
    assert m.total_token_throughput == 44.25  # 177 / 4 s


def test_ttft(run: Timeline) -> None:
    d = Metrics.of(run).ttft  # 300, 500, 1000 ms
    assert d.count == 3
    assert d.mean == pytest.approx(600.0)
    assert d.median == pytest.approx(500.0)
    assert d.std == pytest.approx(294.392028877595)  # sqrt((300² + 100² + 400²) / 3) = sqrt(86666.67)
    assert d.p90 == pytest.approx(900.0)  # rank 0.9·2 = 1.8: 500 + 0.8·500
    assert d.p99 == pytest.approx(990.0)  # rank 1.98: 500 + 0.98·500
    assert d.max == pytest.approx(1000.0)


def test_tpot_leaves_out_single_tokens(run: Timeline) -> None:
    d = Metrics.of(run).tpot  # 200, 400 ms
    assert d.count == 2
    assert d.mean == pytest.approx(300.0)
    assert d.std == pytest.approx(100.0)
    assert d.p90 == pytest.approx(380.0)  # 200 + 0.9·200
    assert d.p99 == pytest.approx(398.0)
    assert d.max == pytest.approx(400.0)


def test_itl_is_pooled_over_requests(run: Timeline) -> None:
    d = Metrics.of(run).itl  # 100, 300, 200 of request 0; 400 of request 1
    assert d.count == 4
    assert d.mean == pytest.approx(250.0)  # 1000 / 4, not the mean of the two TPOTs
    assert d.median == pytest.approx(250.0)
    assert d.std == pytest.approx(111.803398874989)  # sqrt((150² + 50² + 50² + 150²) / 4) = sqrt(12500)
    assert d.p90 == pytest.approx(370.0)  # rank 0.9·3 = 2.7: 300 + 0.7·100
    assert d.p99 == pytest.approx(397.0)  # rank 2.97
    assert d.max == pytest.approx(400.0)


def test_e2el(run: Timeline) -> None:
    d = Metrics.of(run).e2el  # 300, 900, 1600 ms
    assert d.mean == pytest.approx(933.333333333333)
    assert d.median == pytest.approx(900.0)
    assert d.p90 == pytest.approx(1460.0)  # 900 + 0.8·700
    assert d.p99 == pytest.approx(1586.0)  # 900 + 0.98·700
    assert d.max == pytest.approx(1600.0)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft_ms": 600}, 2),  # 1000 fails, 500 and 300 keep it
        ({"ttft_ms": 299}, 0),
        ({"tpot_ms": 300}, 2),  # 200 keeps it, 400 fails, the single token counts as 0
        ({"itl_ms": 350}, 2),  # longest gaps 300, 400 and none
        ({"itl_ms": 250}, 1),  # request 0 has TPOT 200, but one gap of 300
        ({"e2el_ms": 1000}, 2),  # 1600 fails
        ({"ttft_ms": 600, "tpot_ms": 300}, 1),  # only the single token keeps both
        ({"ttft_ms": 1001, "tpot_ms": 401, "itl_ms": 401, "e2el_ms": 1601}, 3),
    ],
)
def test_goodput(run: Timeline, limits: dict[str, float], good: int) -> None:
    assert Metrics.of(run).goodput(**limits) == good / 4.0


def test_a_latency_equal_to_its_limit_keeps_it() -> None:
    timeline = Timeline((), (request(0, 1, 0.0, (0.5, 1.0), "stop"),))
    assert Metrics.of(timeline).goodput(ttft_ms=500, tpot_ms=500, itl_ms=500, e2el_ms=1000) == 1.0


def test_goodput_without_limits_is_an_error(run: Timeline) -> None:
    with pytest.raises(ValueError, match="needs a limit"):
        Metrics.of(run).goodput()


def test_phase_seconds_and_overlap(run: Timeline) -> None:
    # prefill [0, 1] and [1.25, 1.75]; decode [0.5, 2]; mixed [3, 4]
    assert Metrics.of(run).phase_seconds == {"prefill": 1.5, "decode": 1.5, "mixed": 1.0}
    assert overlap_seconds(run) == 1.0  # [0.5, 1] and [1.25, 1.75]
    assert busy_seconds(run) == 3.0  # [0, 2] and [3, 4]
    assert busy_seconds(run, lane="decode") == 2.5  # [0.5, 2] and [3, 4]
    assert busy_seconds(run, lane="decode", phase="decode") == 1.5
    assert busy_seconds(run, lane="decode", phase="prefill") == 0.0
    assert busy_seconds(run, lane="nowhere") == 0.0


def test_overlap_counts_each_moment_once() -> None:
    lanes = [span("a", "prefill", 0, 2), span("b", "prefill", 1, 3), span("c", "decode", 0.5, 1.5)]
    lanes += [span("d", "decode", 1.0, 2.5), span("c", "decode", 2.75, 9.0)]
    timeline = Timeline(tuple(lanes), ())
    assert overlap_seconds(timeline) == 2.25  # prefill [0, 3] meets decode [0.5, 2.5] and [2.75, 9]
    assert busy_seconds(timeline, phase="prefill") == 3.0


def test_touching_spans_do_not_overlap() -> None:
    assert overlap_seconds(Timeline((span("a", "prefill", 0, 1), span("a", "decode", 1, 2)), ())) == 0.0


def test_rate_counts_cut_spans_pro_rata(run: Timeline) -> None:
    assert rate(run, "prefill", 0, 4) == 42.5  # (100 + 50 + 20) / 4
    assert rate(run, "decode", 0, 4) == 4.0  # (4 + 2 + 10) / 4
    assert rate(run, "prefill", 0.5, 1.5) == 75.0  # half of 100, half of 50
    assert rate(run, "decode", 1.0, 1.75) == 4.0  # (half of 4 + half of 2) / 0.75
    assert rate(run, "prefill", 3.5, 4.0) == 20.0  # half of the mixed span's 20
    assert rate(run, "decode", 3.25, 3.75) == 10.0  # a window within a span
    assert rate(run, "decode", 2.0, 3.0) == 0.0


def test_rate_of_an_instant_span() -> None:
    timeline = Timeline((span("a", "decode", 1.0, 1.0, decode=6),), ())
    assert rate(timeline, "decode", 1.0, 3.0) == 3.0
    assert rate(timeline, "decode", 0.0, 1.0) == 0.0


def test_rate_refuses_what_makes_no_sense(run: Timeline) -> None:
    with pytest.raises(ValueError, match="positive length, got 2 to 2"):
        rate(run, "decode", 2, 2)
    with pytest.raises(ValueError, match="'mixed'"):
        rate(run, "mixed", 0, 1)  # type: ignore[arg-type]


def test_no_requests_gives_none_and_zero_never_nan() -> None:
    m = Metrics.of(Timeline((), ()))
    assert (m.completed, m.failed, m.completed_share, m.duration_s) == (0, 0, None, 0.0)
    assert (m.request_throughput, m.output_throughput, m.goodput(ttft_ms=1)) == (0.0, 0.0, 0.0)
    assert (m.itl.mean, m.itl.p99, m.itl.max, m.itl.count) == (None, None, None, 0)
    assert "NaN" not in json.dumps(m.to_dict())
    assert "n/a" in str(m)


def test_only_single_token_outputs() -> None:
    m = Metrics.of(Timeline((), tuple(request(i, 10, 0.0, (0.5,), "length") for i in range(2))))
    assert m.ttft.mean == m.e2el.mean == 500.0
    assert m.tpot.count == m.itl.count == 0
    assert m.output_throughput == 4.0  # 2 tokens in 0.5 s


def test_a_completed_request_without_tokens_has_no_latency() -> None:
    m = Metrics.of(Timeline((), (RequestRecord(0, 10, 0.0, finished=2.0, finish_reason="stop"),)))
    assert (m.completed, m.ttft.count, m.request_throughput) == (1, 0, 0.5)
    assert m.goodput(ttft_ms=1e9) == 0.0


def test_to_dict_has_the_names_of_vllm_bench_serve(run: Timeline) -> None:
    figures = Metrics.of(run).to_dict()
    assert figures["duration"] == 4.0
    assert figures["completed"] == 3
    assert figures["request_throughput"] == 0.75
    assert figures["mean_ttft_ms"] == pytest.approx(600.0)
    assert figures["p99_itl_ms"] == pytest.approx(397.0)
    assert figures["max_itl_ms"] == pytest.approx(400.0)
    statistics = ("mean", "median", "std", "p90", "p99", "max")
    assert {f"{s}_{n}_ms" for s in statistics for n in ("ttft", "tpot", "itl", "e2el")} <= set(figures)
    assert json.loads(json.dumps(figures)) == figures


def test_it_prints_a_table_and_is_frozen(run: Timeline) -> None:
    m = Metrics.of(run)
    lines = str(m).splitlines()
    assert lines[0].startswith("3 of 7 requests completed in 4.00 s: 0.75 requests/s, 1.8 output tok/s")
    assert lines[2].split() == ["TTFT", "600.00", "500.00", "900.00", "990.00", "1000.00", "3"]
    assert len(lines) == 6
    with pytest.raises(FrozenInstanceError):
        m.completed = 4  # type: ignore[misc]
