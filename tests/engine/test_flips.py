"""The mode can change at any time: nothing is lost, repeated or recomputed."""

from __future__ import annotations

import threading
import time
from itertools import cycle, islice, pairwise
from typing import Any

import pytest
from conftest import PAGE, MakeEngine
from tiny_models import expected, prompts_of

from splitwiser_lab import Engine
from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import LaneError

CYCLE: list[tuple[str, dict[str, Any]]] = [
    ("chunked", {"chunk_tokens": 5}),
    ("processes", {}),
    ("sequential", {}),
    ("processes", {"prefill_tokens": 40}),
    ("chunked", {"chunk_tokens": 16}),
    ("sequential", {"max_batch": 4}),
]
PROMPTS = prompts_of(70, 20, 5, 90, 33, 64, 12, 50)


class Flipper(threading.Thread):
    """Changes the mode `count` times, each time waiting until it has taken effect."""

    def __init__(self, engine: Engine, count: int) -> None:
        super().__init__(daemon=True)
        self.engine, self.count, self.errors = engine, count, []
        self.flips: list[str] = []

    def run(self) -> None:
        try:
            for mode, options in islice(cycle(CYCLE), self.count):
                before = len(self.engine.timeline().modes)
                self.engine.set_mode(mode, **options)
                self.flips.append(mode)
                deadline = time.monotonic() + 10
                while self.engine.mode != mode or len(self.engine.timeline().modes) == before:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{mode} has not taken effect after 10 s")
                    time.sleep(0.0005)
                time.sleep(0.003)  # some steps in this mode
        except Exception as error:
            self.errors.append(error)


def run_while_flipping(engine: Engine, count: int, **sampling: Any) -> tuple[Flipper, list[Any]]:
    engine.set_mode("processes")  # its processes start here, not in the middle
    flipper = Flipper(engine, count)
    flipper.start()
    results = []
    while flipper.is_alive():
        results.append(engine.generate(PROMPTS, 40, **sampling))
    flipper.join()
    assert not flipper.errors
    return flipper, results


@pytest.mark.timeout(120)
def test_a_hundred_flips_under_load(engine: Engine) -> None:
    changes_before = len(engine.timeline().modes)
    flipper, results = run_while_flipping(engine, 100)
    changes = engine.timeline().modes[changes_before + 1 :]
    assert [change.mode for change in changes[-100:]] == flipper.flips, "each flip took effect, in order"
    assert all(a.time < b.time for a, b in pairwise(changes))

    wanted = expected("llama", PROMPTS, 40)
    assert len(results) > 2
    in_flight = 0
    for result in results:
        assert result.tokens == wanted
        timeline = result.timeline
        assert sum(span.prefill_tokens for span in timeline.spans) == sum(map(len, PROMPTS)), "nothing recomputed"
        assert sum(span.decode_tokens for span in timeline.spans) == len(PROMPTS) * 39
        assert all(request.preemptions == 0 for request in timeline.requests)
        in_flight += sum(0 < change.time < timeline.duration for change in timeline.modes)
    assert in_flight >= 60, "most flips came while requests were in flight"
    assert {span.mode for result in results for span in result.timeline.spans} == {mode for mode, _ in CYCLE}


@pytest.mark.timeout(120)
def test_flips_while_pages_are_short(make_engine: MakeEngine) -> None:
    """Every request needs some of the same few pages: preemptions and flips together."""
    engine = make_engine(kv_tokens=160)
    flipper, results = run_while_flipping(engine, 40)
    assert [change.mode for change in engine.timeline().modes[-40:]] == flipper.flips
    assert all(result.tokens == expected("llama", PROMPTS, 40) for result in results)
    assert sum(request.preemptions for result in results for request in result.requests) > 0


@pytest.mark.timeout(120)
def test_flips_do_not_touch_samples(engine: Engine) -> None:
    alone = engine.generate(PROMPTS, 40, temperature=1.1, top_p=0.9).tokens
    _, results = run_while_flipping(engine, 30, temperature=1.1, top_p=0.9)
    assert all(result.tokens == alone for result in results)


def test_spans_carry_the_mode_of_their_lanes(engine: Engine) -> None:
    """No batch of the old lanes is booked under the new mode: lanes drain before the change."""
    _, results = run_while_flipping(engine, 30)
    for result in results:
        for span in result.timeline.spans:
            assert (span.lane == "main") == (span.mode != "processes")


@pytest.mark.parametrize("mode", ["sequential", "chunked", "processes"])
def test_set_mode_from_inside_on_token(engine: Engine, mode: str) -> None:
    engine.set_mode("processes" if mode == "sequential" else "sequential")

    def flip(request: Request, token: int) -> None:
        if len(request.output) == 3:
            engine.set_mode(mode)

    result = engine.generate(PROMPTS, 12, on_token=flip)
    assert result.tokens == expected("llama", PROMPTS, 12)
    assert engine.mode == mode
    assert result.timeline.spans[-1].mode == mode


def test_a_mode_that_cannot_start_leaves_the_old_one(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(mode="chunked")
    with monkeypatch.context() as patched:
        patched.setattr("sys.executable", "/nowhere/python")
        with pytest.raises(LaneError, match="could not be started"):
            engine.set_mode("processes")
        patched.setattr("sys.executable", "/bin/false")
        with pytest.raises(LaneError, match="exited with code 1"):
            engine.set_mode("processes")
    assert engine.mode == "chunked"
    assert engine.generate(PROMPTS[:2], 6).tokens == expected("llama", PROMPTS[:2], 6)
    engine.set_mode("processes")
    assert engine.generate(PROMPTS[:2], 6).tokens == expected("llama", PROMPTS[:2], 6)


def test_options_last_until_the_next_change(engine: Engine) -> None:
    engine.set_mode("sequential", max_batch=1)
    assert max(span.sequences for span in engine.generate(PROMPTS, 4).timeline.spans) == 1
    engine.set_mode("sequential")
    result = engine.generate(PROMPTS, 4)
    assert max(span.sequences for span in result.timeline.spans) > 1
    assert result.timeline.modes[0].options == {}
    assert engine.pool.page_size == PAGE
