"""Lanes are told what work to expect, when nothing is under way, and not where nobody wants it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeEngine
from tiny_models import prompts_of

from splitwiser_lab.lanes.inline import InlineLane
from splitwiser_lab.lanes.process import ProcessLane
from splitwiser_lab.model.graph_shapes import UsualWork

Told = list[tuple[str, UsualWork]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found: Told = []
    for kind in (InlineLane, ProcessLane):

        def warm_up(self: Any, work: UsualWork) -> None:
            found.append((self.name, work))

        monkeypatch.setattr(kind, "warm_up", warm_up)
    return found


def test_each_lane_is_told_what_its_policy_will_give_it(make_engine: MakeEngine, told: Told) -> None:
    lines: list[str] = []
    engine = make_engine("llama", "sequential", max_batch=6, prefill_tokens=90, report=lines.append)
    engine.set_mode("chunked", chunk_tokens=48)
    engine.set_mode("processes")
    assert told == [
        ("main", UsualWork(rows=6, prefill_tokens=90)),
        ("main", UsualWork(rows=32, mixed_tokens=48)),
        ("decode", UsualWork(rows=32)),
        ("prefill", UsualWork(prefill_tokens=512)),
    ]
    assert lines[0].startswith("warming up for sequential: lane main, ") and len(lines) == 4
    engine.set_mode("chunked", chunk_tokens=48)
    assert len(lines) == 4 and len(told) == 5, "the lane is asked again, and whoever watches is not told again"
    engine.set_mode("chunked", chunk_tokens=64)
    assert len(lines) == 5


def test_it_can_be_left_out(make_engine: MakeEngine, told: Told) -> None:
    make_engine("llama", "sequential", warm_up=False).set_mode("chunked")
    assert not told


def test_while_requests_are_under_way_their_lanes_are_left_alone(make_engine: MakeEngine, told: Told) -> None:
    engine = make_engine("llama")
    told.clear()
    seen = []

    def flip(request: Any, token: int) -> None:
        if not seen:
            engine.set_mode("processes")
        seen.append(token)

    engine.generate(prompts_of(9, 12), 6, ignore_eos=True, on_token=flip)
    assert len(seen) == 12 and engine.mode == "processes"
    engine.set_mode("chunked")
    assert [name for name, _ in told] in (["main"], ["decode", "prefill", "main"]), "at rest again"
