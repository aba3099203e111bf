"""The figures of a stretch count what lies in it, and the overlap gain is that of the definition."""

from __future__ import annotations

import pytest

from splitwiser_lab.measure.stretch import Alone, Stretch, gaps_ms
from splitwiser_lab.timeline import RequestRecord, Span, SpanPhase, Timeline


def span(
    phase: SpanPhase, start: float, end: float, prefill: int = 0, decode: int = 0, mode: str = "sequential"
) -> Span:
    return Span("main" if mode == "sequential" else phase, phase, start, end, prefill, decode, 1, mode)


# Prefill takes 2 ms a token, a decode step 8 ms and 2 ms more for each request.
ALONE = [
    span("prefill", 0.0, 0.2, prefill=100),
    span("decode", 0.2, 0.21, decode=1),
    span("decode", 0.21, 0.226, decode=4),
]


def test_alone_is_a_time_per_token_and_a_line_over_the_batch() -> None:
    alone = Alone.fit(ALONE)
    assert alone is not None
    assert alone.prefill_s_per_token == pytest.approx(0.002)
    assert (alone.decode_s_per_step, alone.decode_s_per_sequence) == (pytest.approx(0.008), pytest.approx(0.002))
    assert alone.seconds(span("mixed", 0, 1, prefill=50, decode=2)) == pytest.approx(0.1 + 0.012)
    assert alone.request_seconds(100, 10, batch=4) == pytest.approx(0.2 + 10 * (0.002 + 0.002))


def test_alone_needs_both_phases_and_takes_no_spans_of_other_modes() -> None:
    assert Alone.fit(ALONE[:1]) is None
    assert (
        Alone.fit([span(s.phase, s.start, s.end, s.prefill_tokens, s.decode_tokens, "processes") for s in ALONE])
        is None
    )


def test_alone_never_gets_cheaper_with_a_larger_batch() -> None:
    noisy = [*ALONE[:1], span("decode", 1.0, 1.02, decode=1), span("decode", 1.1, 1.11, decode=4)]
    alone = Alone.fit(noisy)
    assert alone is not None and alone.decode_s_per_sequence == 0
    assert alone.decode_s_per_step == pytest.approx(0.015)


def test_gain_is_1_in_turns_and_2_when_both_run_side_by_side_at_full_speed() -> None:
    alone = Alone.fit(ALONE)
    turns = Timeline(
        (span("prefill", 0, 0.2, 100), *(span("decode", 0.2 + i / 100, 0.21 + i / 100, 0, 1) for i in range(20))), ()
    )
    both = Timeline(
        (span("prefill", 0, 0.2, 100), *(span("decode", i / 100, (i + 1) / 100, 0, 1) for i in range(20))), ()
    )
    assert Stretch.of(turns, "a", 0, 1, alone).overlap_gain == pytest.approx(1.0)
    assert Stretch.of(both, "b", 0, 1, alone).overlap_gain == pytest.approx(2.0)
    assert Stretch.of(both, "b", 2, 3, alone).overlap_gain is None
    assert Stretch.of(both, "b", 0, 1).overlap_gain is None


REQUESTS = (
    RequestRecord(0, 9, 0.0, (0.5, 0.6, 0.8), 0.1, 0.5, 0.8, "length"),  # done before the stretch
    RequestRecord(1, 9, 0.4, (0.9, 1.1, 1.5), 0.5, 0.9, 1.5, "length"),  # first token before, done in it
    RequestRecord(2, 9, 1.0, (1.2, 1.3), 1.1, 1.2),  # first token in it, goes on
)


def test_a_stretch_counts_first_tokens_gaps_and_completions_that_lie_in_it() -> None:
    figures = Stretch.of(Timeline((), REQUESTS), "chunked", 1.0, 2.0)
    assert figures.ttft_ms == pytest.approx(200)
    assert figures.tpot_ms == pytest.approx(300) and figures.completed == 1
    assert figures.itl_ms == pytest.approx(200)  # 200, 400 and 100 ms
    assert figures.output_tokens_per_s == pytest.approx(4.0)
    assert figures.p99_itl_ms == pytest.approx(396)


def test_a_stretch_in_which_nothing_happened_says_so() -> None:
    figures = Stretch.of(Timeline((), ()), "sequential", 3.0, 4.0)
    assert (figures.ttft_ms, figures.tpot_ms, figures.itl_ms, figures.p99_itl_ms) == (None,) * 4
    assert figures.output_tokens_per_s == 0
    with pytest.raises(ValueError, match="positive length"):
        Stretch.of(Timeline((), ()), "sequential", 3.0, 3.0)


def test_gaps_come_in_order_of_time_over_all_requests() -> None:
    at, gap = gaps_ms(REQUESTS, 0.0, 9.0)
    assert list(at) == [0.6, 0.8, 1.1, 1.3, 1.5]
    assert gap.tolist() == pytest.approx([100, 200, 200, 100, 400])
