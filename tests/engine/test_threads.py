"""Many threads, one engine; and many engines, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MakeEngine
from tiny_models import CONTEXT, expected, prompts_of

from splitwiser_lab import Engine, SplitwiserError
from splitwiser_lab.engine.request import Request

pytestmark = pytest.mark.timeout(60)
MODES = ["sequential", "chunked", "processes"]
PROMPTS = prompts_of(40, 12, 25, 60, 33, 20, 90, 70)


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_generate_at_once(engine: Engine, mode: str) -> None:
    engine.set_mode(mode)
    halves = [PROMPTS[:4], PROMPTS[4:]]
    wanted = [expected("llama", half, 30) for half in halves]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(5):
            results = list(threads.map(lambda half: engine.generate(half, 30), halves))
            assert [result.tokens for result in results] == wanted


def test_a_short_call_does_not_wait_for_a_long_one_of_another_thread(engine: Engine) -> None:
    """Whoever drives the loop drives everyone's requests, but must let the others see that theirs are done."""
    engine.set_mode("sequential")
    begun, progress, new = threading.Event(), [0], CONTEXT - 90

    def listen(request: Request, token: int) -> None:
        progress[0] = len(request.output)
        begun.set()

    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(engine.generate, PROMPTS, new, on_token=listen)
        assert begun.wait(10)
        for _ in range(5):
            before = progress[0]
            engine.generate(PROMPTS[0], 2)
            assert progress[0] - before < 60, "two tokens took as long as 60 of the other thread"
        assert not long.done()
        assert long.result().tokens == expected("llama", PROMPTS, new)


def test_two_engines_in_two_threads(make_engine: MakeEngine) -> None:
    """They share nothing, not even scratch memory."""
    families = ["llama", "qwen3"]
    engines = [make_engine(family) for family in families]
    wanted = [expected(family, PROMPTS, 30) for family in families]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(10):
            results = list(threads.map(lambda engine: engine.generate(PROMPTS, 30).tokens, engines))
            assert results == wanted


def test_submitted_from_many_threads_run_by_one(engine: Engine) -> None:
    engine.set_mode("chunked")
    with ThreadPoolExecutor(8) as threads:
        requests = list(threads.map(lambda prompt: engine.submit(prompt, max_new_tokens=9), PROMPTS))
    engine.run()
    assert [request.output for request in requests] == expected("llama", PROMPTS, 9)


def test_submitted_while_another_thread_runs(engine: Engine) -> None:
    """A live view adds requests to an engine that is busy; they are carried out without a driver of their own."""
    engine.set_mode("sequential")
    late: list[Request] = []

    def listen(request: Request, token: int) -> None:
        if len(request.output) == 5 and not late:
            late.extend(engine.submit(prompt, max_new_tokens=6) for prompt in PROMPTS[1:4])

    engine.generate(PROMPTS[0], 150, on_token=listen)
    assert [request.output for request in late] == expected("llama", PROMPTS[1:4], 6)


@pytest.mark.parametrize("mode", MODES)
def test_generate_from_inside_on_token(engine: Engine, mode: str) -> None:
    engine.set_mode(mode)
    inner: list[list[list[int]]] = []

    def listen(request: Request, token: int) -> None:
        if len(request.output) == 4 and not inner:
            inner.append([])
            inner[0] = engine.generate(PROMPTS[4:6], 5).tokens

    assert engine.generate(PROMPTS[:3], 20, on_token=listen).tokens == expected("llama", PROMPTS[:3], 20)
    assert inner == [expected("llama", PROMPTS[4:6], 5)]


def closing_from_a_thread(engine: Engine) -> Callable[[Request, int], None]:
    closers: list[threading.Thread] = []

    def listen(request: Request, token: int) -> None:
        if len(request.output) == 10 and not closers:
            closers.append(threading.Thread(target=engine.close))
            closers[0].start()

    return listen


def closing_at_once(engine: Engine) -> Callable[[Request, int], None]:
    return lambda request, token: engine.close() if len(request.output) == 10 else None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [closing_from_a_thread, closing_at_once])
def test_closed_in_the_middle_of_a_run(
    make_engine: MakeEngine, mode: str, how: Callable[[Engine], Callable[[Request, int], None]], no_process_left: None
) -> None:
    """Requests under way end as cancelled, soon; the driver hears of it or gets what there is."""
    engine = make_engine(mode=mode)
    requests = [engine.submit(prompt, max_new_tokens=CONTEXT - 90, on_token=how(engine)) for prompt in PROMPTS]
    started = time.monotonic()
    try:
        engine.run()
    except SplitwiserError as error:
        assert "closed" in str(error)
    deadline = started + 20
    while not all(request.done for request in requests) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {request.finish_reason for request in requests} == {"cancelled"}
    wanted = expected("llama", PROMPTS, CONTEXT - 90)
    assert all(r.output == tokens[: len(r.output)] for r, tokens in zip(requests, wanted, strict=True))


@pytest.mark.parametrize("mode", ["processes", "chunked", "sequential"])
def test_a_change_of_mode_is_not_left_hanging_at_the_end_of_a_run(engine: Engine, mode: str) -> None:
    """Asked for during the last batches, when no further step would come to carry it out."""
    for _ in range(20):
        engine.set_mode("processes" if mode != "processes" else "sequential")
        requested = threading.Event()

        def change(requested: threading.Event = requested) -> None:
            requested.wait(10)
            engine.set_mode(mode)

        thread = threading.Thread(target=change)
        thread.start()
        engine.generate(PROMPTS[:3], 3, on_token=lambda request, token, go=requested: go.set())
        thread.join()
        assert engine.mode == mode
