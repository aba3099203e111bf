"""A run's timeline against its own results: no span overlaps another on its lane, no token comes from nowhere."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from tiny_models import expected, prompts_of

from splitwiser_lab import Engine
from splitwiser_lab.engine.result import Result
from splitwiser_lab.metrics import overlap_seconds
from splitwiser_lab.timeline import Timeline

PROMPTS = prompts_of(*[180, 40, 120, 75] * 6)
NEW = 30
MODES: dict[str, dict[str, Any]] = {
    "sequential": {"prefill_tokens": 128},
    "chunked": {"chunk_tokens": 32},
    "processes": {"prefill_tokens": 128},
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def result(engine: Engine, mode: str) -> Result:
    engine.set_mode(mode, **MODES[mode])
    result = engine.generate(PROMPTS, NEW)
    assert result.tokens == expected("llama", PROMPTS, NEW)
    assert not any(request.preemptions for request in result.requests)
    return result


def test_spans_of_a_lane_do_not_overlap(result: Result, mode: str) -> None:
    timeline = result.timeline
    assert set(timeline.lanes) == ({"prefill", "decode"} if mode == "processes" else {"main"})
    for lane in timeline.lanes:
        spans = sorted((span for span in timeline.spans if span.lane == lane), key=lambda span: span.start)
        assert all(0 <= span.start < span.end for span in spans)
        assert all(earlier.end <= later.start for earlier, later in pairwise(spans))
    if mode == "processes":
        assert all(span.lane == span.phase for span in timeline.spans)


def test_tokens_add_up(result: Result, mode: str) -> None:
    """A prompt gives its first token as it is prefilled; each other token is one of a decode span."""
    spans = result.timeline.spans
    assert sum(span.prefill_tokens for span in spans) == sum(map(len, PROMPTS))
    assert sum(span.decode_tokens for span in spans) == len(PROMPTS) * (NEW - 1)
    assert any(span.phase == "mixed" for span in spans) == (mode == "chunked")
    for span in spans:
        kinds = {"prefill": (True, False), "decode": (False, True), "mixed": (True, True)}
        assert (span.prefill_tokens > 0, span.decode_tokens > 0) == kinds[span.phase]
        assert span.sequences >= (span.decode_tokens or 1)
        assert span.mode == mode


def test_each_token_follows_the_end_of_its_span(result: Result) -> None:
    """Between the end of a span and the token's time lies only the way from the lane to the engine."""
    timeline = result.timeline
    ends = sorted(span.end for span in timeline.spans)
    for record in timeline.requests:
        assert record.scheduled is not None and record.finished is not None and record.hand_off is not None
        assert record.arrival <= record.scheduled < record.token_times[0] == record.hand_off
        assert record.finished >= record.token_times[-1]
        assert all(earlier < later for earlier, later in pairwise(record.token_times))
        first_start = min(span.start for span in timeline.spans if span.end > record.scheduled)
        assert record.token_times[0] > first_start
        for moment in record.token_times:
            assert any(end <= moment for end in ends)
    for moment in {moment for record in timeline.requests for moment in record.token_times}:
        newest = max(end for end in ends if end <= moment)
        assert moment - newest < 1.0


def test_metrics_are_those_of_the_results(result: Result) -> None:
    metrics = result.metrics
    assert (metrics.completed, metrics.failed, metrics.completed_share) == (len(PROMPTS), 0, 1.0)
    assert metrics.total_output_tokens == sum(map(len, result.tokens)) == len(PROMPTS) * NEW
    assert metrics.total_input_tokens == sum(map(len, PROMPTS))
    assert metrics.itl.count == len(PROMPTS) * (NEW - 1)
    assert metrics.duration_s == result.timeline.duration
    assert metrics.output_throughput == pytest.approx(len(PROMPTS) * NEW / metrics.duration_s)
    assert metrics.ttft.max is not None and metrics.e2el.max is not None
    assert 0 < metrics.ttft.max < metrics.e2el.max <= metrics.duration_s * 1e3


def test_the_two_phases_really_run_at_once(engine: Engine) -> None:
    """In `processes` some prefill span and some decode span intersect; on one lane none ever do."""
    overlaps = {}
    for mode in MODES:
        engine.set_mode(mode, **MODES[mode])
        overlaps[mode] = overlap_seconds(engine.generate(PROMPTS, NEW).timeline)
    assert overlaps["processes"] > 0
    assert overlaps["sequential"] == overlaps["chunked"] == 0


def test_a_result_holds_its_own_run_only(engine: Engine) -> None:
    engine.set_mode("chunked")
    engine.generate(PROMPTS[:4], 5)
    engine.set_mode("sequential")
    timeline = engine.generate(PROMPTS[:2], 5).timeline
    assert [change.mode for change in timeline.modes] == ["sequential"], "the mode in force at the start"
    assert timeline.modes[0].time == 0
    assert sum(span.prefill_tokens for span in timeline.spans) == sum(map(len, PROMPTS[:2]))
    assert all(span.mode == "sequential" for span in timeline.spans)


def test_it_survives_json(result: Result) -> None:
    assert Timeline.from_json(result.timeline.to_json()) == result.timeline
