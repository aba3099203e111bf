"""Too few pages: the youngest give theirs back, wait, and go on where they were, with the same tokens."""

from __future__ import annotations

import pytest
from conftest import PAGE, MakeEngine
from tiny_models import expected, prompts_of

from splitwiser_lab import Engine
from splitwiser_lab.engine.result import Result
from splitwiser_lab.measure.chrome_trace import chrome_trace
from splitwiser_lab.timeline import RequestRecord, Timeline

PROMPTS = prompts_of(30, 44, 12, 60, 25, 38, 51, 20)
NEW = 50


def pages(tokens: int) -> int:
    return -(-tokens // PAGE)


NEED = sum(pages(len(prompt) + NEW) for prompt in PROMPTS)


def check(result: Result) -> None:
    assert result.tokens == expected("llama", PROMPTS, NEW)
    preempted = [request for request in result.requests if request.preemptions]
    assert preempted, "the pool was large enough: this tests nothing"
    spans = result.timeline.spans
    again = sum(span.prefill_tokens for span in spans) - sum(map(len, PROMPTS))
    assert again > 0, "what was given back has to be computed again"
    assert result.requests[0].preemptions == 0, "the oldest never gives way"


@pytest.mark.parametrize("mode", ["sequential", "chunked", "processes"])
def test_a_quarter_of_the_pages_gives_the_same_tokens(make_engine: MakeEngine, mode: str) -> None:
    with make_engine(mode=mode, kv_tokens=NEED // 4 * PAGE) as engine:
        check(engine.generate(PROMPTS, NEW))
        assert engine.kv_use == 0


def test_one_request_at_a_time_is_the_least(make_engine: MakeEngine) -> None:
    """A pool that holds just the longest request."""
    engine = make_engine(kv_tokens=pages(60 + NEW) * PAGE)
    for mode in ("sequential", "chunked"):
        engine.set_mode(mode)
        check(engine.generate(PROMPTS, NEW))


def test_samples_survive_preemption(make_engine: MakeEngine, engine: Engine) -> None:
    plenty = engine.generate(PROMPTS, NEW, temperature=1.0, top_p=0.9, seed=3)
    short = make_engine(kv_tokens=NEED // 4 * PAGE).generate(PROMPTS, NEW, temperature=1.0, top_p=0.9, seed=3)
    assert short.tokens == plenty.tokens
    assert sum(request.preemptions for request in short.requests) > 0
    assert sum(request.preemptions for request in plenty.requests) == 0


def test_preempted_requests_are_recorded(make_engine: MakeEngine) -> None:
    result = make_engine(kv_tokens=NEED // 4 * PAGE).generate(PROMPTS, NEW)
    for request, record in zip(result.requests, result.timeline.requests, strict=True):
        assert record.preemptions == request.preemptions == len(record.preempted)
        assert record.scheduled is not None and record.finished is not None
        assert all(record.scheduled < moment < record.finished for moment in record.preempted)
        if record.preemptions:
            assert record.hand_off is not None and record.hand_off > record.preempted[-1], "handed off once more"
            before = [moment for moment in record.token_times if moment < record.preempted[-1]]
            assert before and before[-1] < record.preempted[-1] < record.token_times[len(before)], "a pause around it"
        else:
            assert record.hand_off == record.token_times[0]
        assert list(record.token_times) == sorted(record.token_times)
        assert len(record.token_times) == NEW
    read = Timeline.from_json(result.timeline.to_json())
    assert read.requests == result.timeline.requests
    drawn = [event for event in chrome_trace(read)["traceEvents"] if event["name"] == "preempted"]
    moments = [moment for record in read.requests for moment in record.preempted]
    assert [event["ts"] for event in drawn] == [round(moment * 1e6, 3) for moment in moments]


def test_a_timeline_from_before_preemptions_had_times_is_read() -> None:
    raw = Timeline((), (RequestRecord(0, 3, 0.0, preemptions=2),)).to_dict()
    del raw["requests"][0]["preempted"]
    [record] = Timeline.from_dict(raw).requests
    assert (record.preemptions, record.preempted) == (2, ())
