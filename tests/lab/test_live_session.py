"""A live session: requests keep coming, flips act in mid-run and lose nothing, every finished request is compared."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import MakeEngine
from tiny_models import build, tiny

from splitwiser_lab import Engine, ModeError, SplitwiserError, Workload
from splitwiser_lab.lab.dashboard.frame import Frame
from splitwiser_lab.lab.dashboard.knobs import Settings
from splitwiser_lab.lab.dashboard.session import Session
from splitwiser_lab.lab.live_lab import flip, live

pytestmark = pytest.mark.timeout(120)
MakeSession = Callable[..., Session]


@pytest.fixture
def make_session(make_engine: MakeEngine) -> Iterator[MakeSession]:
    """Sessions over a tiny model, closed after the test."""
    made: list[Session] = []

    def make(
        workload: Workload | None = None, reference: Any = None, engine: Engine | None = None, **wish: Any
    ) -> Session:
        settings = Settings(**{"rate": 30.0, "prompt_tokens": 32, "output_tokens": 16, **wish})
        made.append(Session(engine or make_engine(), workload, settings, reference or tiny("llama")))
        return made[-1]

    yield make
    for session in made:
        session.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("splitwiser-lab")]


def until(session: Session, holds: Callable[[Frame], bool], seconds: float = 60) -> Frame:
    """The first frame of which this holds."""
    deadline = time.monotonic() + seconds
    while not holds(frame := session.frame()):
        assert time.monotonic() < deadline, f"{frame.state}: {frame.message} {frame.tokens.text}"
        time.sleep(0.02)
    return frame


def finished(frame: Frame) -> int:
    return sum(request.completed for part in frame.parts[-1:] for request in part.timeline.requests)


def test_flips_through_all_modes_in_mid_run_lose_nothing_and_change_no_token(make_session: MakeSession) -> None:
    session = make_session()
    session.start()
    for number, mode in enumerate(("chunked", "processes", "sequential")):
        until(session, lambda frame, n=number: finished(frame) > 15 * (n + 1) and frame.running > 0)
        session.choose(mode)
        until(session, lambda frame, m=mode: bool(frame.after) and frame.after.label == m and frame.after.completed > 5)
    frame = session.frame()
    assert [label for _, label in frame.flips] == ["chunked", "processes", "sequential"]
    assert frame.before is not None and frame.before.label == "processes"
    assert frame.tokens.holds is True, frame.tokens.text
    requests = frame.parts[-1].timeline.requests
    begun = [request for request in requests if request.finish_reason != "unfinished"]
    assert {request.finish_reason for request in begun} == {"length"}
    assert {len(request.token_times) for request in begun} == {16}
    assert not any(request.preemptions for request in begun), "a flip recomputes nothing"
    assert "failed" not in frame.tokens.text


def test_a_stretch_longer_than_what_is_looked_at_is_not_taken_for_a_flip(make_session: MakeSession) -> None:
    session = make_session()
    session._horizon = 0.5
    session.start()
    until(session, lambda frame: finished(frame) > 5 and frame.now > 1.5)
    session.choose("chunked")
    frame = until(session, lambda frame: frame.after is not None and frame.after.label == "chunked")
    flipped = frame.flips[-1][0]
    until(session, lambda frame: frame.now > flipped + 1.5)
    frame = session.frame()
    assert [label for _, label in frame.flips] == ["chunked"]
    assert frame.before is not None and frame.before.label == "sequential"


def test_says_no_when_the_engine_writes_other_tokens_than_the_reference(make_session: MakeSession) -> None:
    session = make_session(reference=build("llama", seed=1))
    session.start()
    frame = until(session, lambda frame: frame.tokens.holds is not None)
    assert frame.tokens.holds is False and frame.tokens.text.startswith("NOT identical")


def test_stops_at_once_and_runs_again(make_session: MakeSession, make_engine: MakeEngine) -> None:
    engine = make_engine()
    session = make_session(engine=engine)
    assert session.frame().state == "ready" and not session.active
    session.start()
    until(session, lambda frame: finished(frame) > 3)
    session.stop()
    frame = until(session, lambda frame: frame.state == "stopped")
    assert engine.kv_use == 0 and session.frame().now == frame.now, "a stopped clock"
    session.start()
    until(session, lambda again: again.now > frame.now and finished(again) > finished(frame))
    assert session.frame().before is None, "what came before a pause is not compared with"


def test_other_lengths_are_asked_of_the_reference_before_they_run(make_session: MakeSession) -> None:
    session = make_session()
    session.start()
    until(session, lambda frame: finished(frame) > 3)
    session.turn("prompt_tokens", 64)
    session.turn("output_tokens", 8)
    frame = until(
        session, lambda frame: any(r.completed and r.prompt_tokens == 64 for r in frame.parts[-1].timeline.requests)
    )
    assert frame.tokens.holds is True and "not compared" not in frame.tokens.text


def test_options_of_modes_are_flips_too(make_session: MakeSession, make_engine: MakeEngine) -> None:
    engine = make_engine()
    session = make_session(engine=engine, mode="chunked")
    session.start()
    until(session, lambda frame: frame.state == "running")
    session.turn("chunk_tokens", 16)
    session.turn("max_batch", 2)
    frame = until(session, lambda frame: bool(frame.flips) and "max_batch=2" in frame.flips[-1][1])
    assert "chunk_tokens=16" in frame.flips[-1][1]
    assert (engine.limits.chunk_tokens, engine.limits.max_requests) == (16, 2)


def test_a_rate_that_is_not_given_is_chosen_for_this_machine(make_session: MakeSession) -> None:
    session = make_session(rate=None)
    session.start()
    until(session, lambda frame: frame.state == "running")
    assert session.settings.rate is not None and session.settings.rate > 0


def test_a_workload_runs_over_and_over_with_its_own_prompts(make_session: MakeSession) -> None:
    work = Workload.poisson(40.0, requests=3, prompt_tokens=20, output_tokens=6)
    session = make_session(work, rate=None)
    session.start()
    frame = until(session, lambda frame: finished(frame) > 6)
    assert session.settings.rate == pytest.approx(40.0)
    assert {r.prompt_tokens for r in frame.parts[-1].timeline.requests} == {20}
    assert frame.tokens.holds is True
    assert {knob.name for knob in session.knobs if knob.why_not == "the workload's own"} == {
        "prompt_tokens",
        "output_tokens",
    }


def test_an_engine_closed_under_it_is_said_and_does_not_raise(
    make_session: MakeSession, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    session = make_session(engine=engine)
    session.start()
    until(session, lambda frame: finished(frame) > 3)
    engine.close()
    assert "closed" in until(session, lambda frame: frame.state == "failed").message
    session.choose("chunked")
    until(session, lambda frame: "The mode stays" in frame.message or "closed" in frame.message)
    session.close()
    with pytest.raises(SplitwiserError, match="closed"):
        session.start()


def test_a_queue_that_only_grows_is_held_and_said(make_session: MakeSession) -> None:
    session = make_session(rate=700.0, options={"max_batch": 1})
    session.start()
    frame = until(session, lambda frame: "requests wait" in frame.message)
    assert frame.waiting < 150  # those that come within one step are let in together


def test_live_in_a_script_flips_by_its_schedule_and_says_what_it_saw(
    make_engine: MakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine()
    how = {"rate": 30.0, "prompt_tokens": 32, "output_tokens": 16}
    view = live(engine, seconds=2.5, schedule={0: "sequential", 1: "chunked"}, reference=tiny("llama"), **how)
    said = capsys.readouterr().out
    assert "since: chunked" in said and "before: sequential" in said and "identical: all" in said
    assert view.source.frame().state == "stopped" and engine.kv_use == 0
    assert view.drawing.value == "cell" and view.drawing.reason
    view.close()


def test_live_refuses_a_mode_that_does_not_run_here_before_anything_starts(make_engine: MakeEngine) -> None:
    with pytest.raises(ModeError, match="mps"):
        live(make_engine(), mode="mps", seconds=1)
    with pytest.raises(ModeError, match="unknown mode"):
        live(make_engine(), schedule={0: "warp"}, seconds=1)


def test_flip_gives_the_figures_on_either_side(make_engine: MakeEngine) -> None:
    engine = make_engine()
    how = {"rate": 30.0, "prompt_tokens": 32, "output_tokens": 16}
    frame = flip(engine, "sequential", "chunked", 1.0, reference=tiny("llama"), **how)
    assert frame.before is not None and frame.after is not None
    assert (frame.before.label, frame.after.label) == ("sequential", "chunked")
    assert frame.before.itl_ms and frame.after.itl_ms and frame.tokens.holds is True
    assert engine.kv_use == 0 and engine.mode == "sequential"
    with pytest.raises(ModeError):
        flip(engine, "sequential", "mps")
