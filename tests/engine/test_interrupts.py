"""Ctrl-C at any moment: the engine goes on working, with nothing half done inside."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest
import torch
from conftest import MakeEngine
from tiny_models import CONTEXT, expected, prompts_of

from splitwiser_lab import Engine
from splitwiser_lab.engine.request import Request

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals come to the main"),
]
MODES = ["sequential", "chunked", "processes"]
PROMPTS = prompts_of(40, 12, 25, 60, 33, 20)
LONG = CONTEXT - 60


def still_works(engine: Engine) -> None:
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # the caller's thread is as it was
    assert engine.kv_use == 0
    assert not engine._core.scheduler.running and not engine._core.scheduler.waiting
    assert engine.generate(PROMPTS[:3], 6).tokens == expected("llama", PROMPTS[:3], 6)


def interrupt_at(count: int) -> object:
    """A listener that sends Ctrl-C to this process with the `count`-th token."""
    heard = []

    def listen(request: Request, token: int) -> None:
        heard.append(token)
        if len(heard) == count:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 20])
def test_interrupted_generate(engine: Engine, mode: str, count: int) -> None:
    engine.set_mode(mode)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, LONG, on_token=interrupt_at(count))
    still_works(engine)


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_run_goes_on(engine: Engine, mode: str) -> None:
    """`run` owns no request: those under way stay, and the next `run` carries them out."""
    engine.set_mode(mode)
    listen = interrupt_at(31)
    requests = [engine.submit(prompt, max_new_tokens=40, on_token=listen) for prompt in PROMPTS]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert any(not request.done for request in requests)
    engine.run()
    assert [request.output for request in requests] == expected("llama", PROMPTS, 40)
    still_works(engine)


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_costs_no_one_elses_request(engine: Engine, mode: str) -> None:
    """A request queued before by `submit` survives the interrupted `generate` that was driving it."""
    engine.set_mode(mode)
    mine = engine.submit(PROMPTS[0], max_new_tokens=100)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS[1:], LONG, on_token=interrupt_at(31))
    engine.run()
    assert [mine.output] == expected("llama", PROMPTS[:1], 100)
    still_works(engine)


@pytest.fixture
def alarm() -> Iterator[None]:
    """SIGALRM interrupts as SIGINT does; unlike it, a late one does not end the test run."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("mode", MODES)
def test_at_random_moments(engine: Engine, mode: str, alarm: None) -> None:
    """Wherever the interrupt falls: scheduling, sending, computing, receiving, folding back."""
    engine.set_mode(mode)
    numbers, interrupted = random.Random(1), 0
    for _ in range(30):
        with contextlib.suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.005 + numbers.random() * 0.06)
            engine.generate(PROMPTS, LONG)
            signal.setitimer(signal.ITIMER_REAL, 0)
            interrupted -= 1
        interrupted += 1
        still_works(engine)
    assert interrupted > 20


@pytest.mark.parametrize("moment", ["sent", "received"])
def test_no_stale_answer_is_taken_for_the_next(engine: Engine, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Between the lane's pipe and the engine's books: the batch is under way, and nobody knows."""
    engine.set_mode("processes")
    lane = engine._house.lane("process", "decode", {})
    name = "submit" if moment == "sent" else "receive"
    original, calls = getattr(lane, name), []

    def interrupted(*args: object) -> object:
        answer = original(*args)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(lane, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, LONG)
    still_works(engine)
    still_works(engine)


def test_interrupted_while_workers_start(make_engine: MakeEngine, alarm: None, no_process_left: None) -> None:
    engine = make_engine()
    with pytest.raises(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        engine.set_mode("processes")
    assert engine.mode == "sequential"
    still_works(engine)
    engine.set_mode("processes")
    still_works(engine)
    engine.close()
