"""The open loop: requests arrive by the clock, are refused one by one, and end with the time given."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from tiny_models import expected, prompts_of

from splitwiser_lab import Engine, RequestError


@dataclass
class Due:
    """What the engine reads of a request of a workload."""

    arrival_s: float
    prompt: str | list[int]
    max_new_tokens: int = 10
    ignore_eos: bool = True


class Plan:
    """A workload of fixed requests that remembers what it was asked for."""

    def __init__(self, *due: Due) -> None:
        self.due, self.asked = due, {}

    def requests(self, **asked: int) -> list[Due]:
        self.asked = asked
        return list(self.due)


MODES = ["sequential", "chunked", "processes"]


@pytest.mark.parametrize("mode", MODES)
def test_arrivals_are_respected(engine: Engine, mode: str) -> None:
    engine.set_mode(mode)
    prompts = prompts_of(30, 40, 20, 50, 10, 25)
    times = [0.0, 0.0, 0.08, 0.15, 0.15, 0.4]
    started = time.perf_counter()
    result = engine.serve(Plan(*(Due(at, prompt) for at, prompt in zip(times, prompts, strict=True))))
    assert time.perf_counter() - started >= 0.4
    assert result.tokens == expected("llama", prompts, 10)
    for record, due in zip(result.timeline.requests, times, strict=True):
        assert record.arrival == pytest.approx(due, abs=1e-9)
        assert record.scheduled is not None and record.scheduled >= due
        assert record.token_times[0] > record.scheduled
        assert record.finished == pytest.approx(record.token_times[-1], abs=0.05)
    assert result.metrics.completed == 6
    first = result.timeline.requests[0]
    assert result.metrics.per_request[0].ttft_ms == pytest.approx(first.token_times[0] * 1e3)


def test_a_request_that_comes_while_the_engine_is_busy_waits_on_the_clock(engine: Engine) -> None:
    """Its latency counts from when it was due, not from when the engine found time for it."""
    engine.set_mode("sequential", max_batch=1)
    result = engine.serve(Plan(Due(0.0, [1, 2, 3], 200), Due(0.001, [4, 5], 2)))
    long, short = result.timeline.requests
    assert long.finished is not None and short.scheduled is not None
    assert short.scheduled >= long.finished - 0.01
    assert result.metrics.per_request[1].ttft_ms == pytest.approx((short.token_times[0] - 0.001) * 1e3)


@pytest.mark.parametrize("mode", MODES)
def test_time_is_up(engine: Engine, mode: str) -> None:
    """What is unfinished is cancelled, with its tokens; what has not arrived is not there at all."""
    engine.set_mode(mode, max_batch=2)
    prompts = prompts_of(5, *[20] * 30)
    due = [Due(0.0, prompts[0], 3), *(Due(0.01 * i, prompt, 200) for i, prompt in enumerate(prompts[1:]))]
    plan = Plan(*due, Due(60.0, [1]))
    started = time.perf_counter()
    result = engine.serve(plan, seconds=0.35)
    assert 0.3 < time.perf_counter() - started < 3
    assert 2 <= len(result.requests) <= 31
    reasons = [request.finish_reason for request in result.requests]
    assert reasons[0] == "length" and "cancelled" in reasons
    assert result.tokens[0] == expected("llama", prompts[:1], 3)[0]
    waiting = [request for request in result.requests if request.scheduled is None]
    assert all(request.finish_reason == "cancelled" and not request.output for request in waiting)
    assert engine.kv_use == 0
    assert result.metrics.cancelled == reasons.count("cancelled")
    assert engine.generate(prompts[:3], 5).tokens == expected("llama", prompts[:3], 5)


@pytest.mark.parametrize("mode", MODES)
def test_refused_requests_are_recorded_and_the_others_go_on(engine: Engine, mode: str) -> None:
    engine.set_mode(mode)
    prompts = prompts_of(30, 12, 20)
    bad = [Due(0.0, prompts[0], 1000), Due(0.02, []), Due(0.02, [1, 500])]
    good = [Due(0.0, prompts[0]), Due(0.01, prompts[1]), Due(0.05, prompts[2])]
    result = engine.serve(Plan(*sorted(good + bad, key=lambda d: d.arrival_s)))
    reasons = [request.finish_reason for request in result.requests]
    assert reasons == ["length", "refused", "length", "refused", "refused", "length"]
    served = [tokens for tokens, reason in zip(result.tokens, reasons, strict=True) if reason == "length"]
    assert served == expected("llama", prompts, 10)
    assert len(result.errors) == 3 and all(isinstance(error, RequestError) for error in result.errors)
    refused = [record for record in result.timeline.requests if record.finish_reason == "refused"]
    assert ["context" in (record.error or "") for record in refused] == [True, False, False]
    assert result.metrics.refused == 3 and result.metrics.completed == 3
    assert result.metrics.completed_share == 0.5


def test_a_workload_learns_what_fits(engine: Engine) -> None:
    plan = Plan(Due(0.0, [1], 1))
    engine.serve(plan)
    assert plan.asked == {"vocab_size": 199, "max_tokens": 256}


def test_ignore_eos_is_the_workloads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = prompts_of(30)
    (tokens,) = expected("llama", [prompt], 10)
    monkeypatch.setattr(engine._intake, "_config", _with_eos(engine, tokens[4]))
    result = engine.serve(Plan(Due(0.0, prompt, ignore_eos=True), Due(0.0, prompt, ignore_eos=False)))
    assert result.tokens == [tokens, tokens[: tokens.index(tokens[4]) + 1]]


def _with_eos(engine: Engine, token: int) -> object:
    from dataclasses import replace

    return replace(engine.config, eos_token_ids=(token,))


def test_nothing_done_in_no_time(engine: Engine) -> None:
    result = engine.serve(Plan(Due(0.0, [1, 2], 5)), seconds=0)
    assert result.metrics.completed == 0
    assert engine.kv_use == 0
