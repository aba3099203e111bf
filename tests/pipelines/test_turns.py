"""Turns within a time: what comes first, what is left out and why, and what is kept when a run ends early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pipeline_models import model_of

from splitwiser_lab import HardwareError, LaneError, RequestError, Workload
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.pipelines.arrivals import Rate
from splitwiser_lab.pipelines.budget import Budget, Pace
from splitwiser_lab.pipelines.experiment import EXPERIMENTS
from splitwiser_lab.pipelines.turns import Turns

REQUESTS = 4
EXPERIMENT = EXPERIMENTS["small"].with_knobs(input=5, requests=REQUESTS, batch=1)  # a warm-up of one request
Told = list[tuple[str, int, float]]  # way, new tokens, seconds on the clock when it began


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Way:
    """Takes `each` seconds for each new token of each request, and `start` more the first time."""

    def __init__(self, clock: Clock, told: Told, name: str, each: float = 1.0, start: float = 0.0) -> None:
        self.clock, self.told, self.name, self.each, self.start = clock, told, name, each, start
        self.fails: Callable[[int], BaseException | None] = lambda call: None
        self.calls = 0

    def __call__(self, work: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        output = work.arrivals[0].max_new_tokens
        if error := self.fails(self.calls):
            raise error
        self.told.append((self.name, output, self.clock.now))
        took = max(len(work) * output * self.each, work.arrivals[-1].arrival_s)
        self.clock.now += took + (0 if self.calls else self.start)
        self.calls += 1
        served = len(work) / took
        return {"output_throughput": output * served, "request_throughput": served}, [[1] * output] * len(work)


class Launching(Way):
    """Has processes of its own."""

    def launch(self, work: Workload) -> None:
        self.clock.now += self.start
        self.start = 0.0


def turns(
    seconds: float | None = None, rates: tuple[Rate, ...] = (), together: bool = False, **starts: float
) -> tuple[Turns, dict[str, Way], Told]:
    """Ways that take as long as `generate`, and so many seconds to start, on a clock of their own."""
    clock, told = Clock(), Told()
    kind = Launching if together else Way
    ways = {"generate": Way(clock, told, "generate")}
    ways |= {name: kind(clock, told, name, start=start) for name, start in {"sequential": 0.0, **starts}.items()}
    budget = Budget(seconds, clock)
    made = Turns(
        dict(ways), EXPERIMENT, Reference(model_of("llama")), {}, lambda _: None, rates, together, budget
    )  # fmt: skip
    return made, ways, told


def measured(made: Turns) -> dict[str, int]:
    """Rounds by what was measured."""
    return {row.what: row.repeats for row in made.rows}


def test_the_first_round_of_everything_comes_first() -> None:
    made, _, told = turns(rates=(Rate(2.0),), a=0.0)
    made.run((1, 2), repeats=2)
    whole = [(name, output) for name, output, _ in told]
    second = whole.index(("sequential", 1), whole.index(("a", 2)) + 1)  # after all of the first round
    later = [("sequential", 1), ("a", 1), ("generate", 1), ("sequential", 1), ("a", 1)]
    assert whole[second:] == later + [(name, 2) for name, _ in later], "nothing is started or warmed up any more"
    assert set(measured(made).values()) == {2} and len(made.rows) == 2 * 5
    assert [row.what for row in made.rows[:5]] == [
        *("generate, 1 new tokens", "sequential, 1 new tokens", "a, 1 new tokens"),
        *("sequential, 1 new tokens, 2 requests/s", "a, 1 new tokens, 2 requests/s"),
    ]
    assert not made.left_out


def test_a_share_of_what_is_served_is_that_of_the_first_round() -> None:
    made, ways, _ = turns(rates=(Rate(0.5, of_served=True),))
    slower = ways["sequential"].__call__

    def drifting(work: Workload) -> Any:
        ways["sequential"].each *= 1.5
        return slower(work)

    made.runners["sequential"] = drifting
    made.run((1,), repeats=3)
    assert len({row.rate for row in made.rows}) == 2, "one rate, besides all at once"


def test_what_has_no_time_is_left_out_and_said() -> None:
    # the reference 4 s, sequential's warm-up 1 s and a's 11 s, a round 3 × 4 s: 28 s; then another 12 s a round
    made, _, told = turns(seconds=45, a=10.0)
    made.run((1,), repeats=3)
    assert measured(made) == {"generate, 1 new tokens": 2, "sequential, 1 new tokens": 2, "a, 1 new tokens": 2}
    assert {left.what: left.rounds for left in made.left_out} == dict.fromkeys(measured(made), 3)
    assert all("no time: 5 s of 45 s are left, and it needs about 8 s" in left.why for left in made.left_out), (
        made.left_out
    )
    assert told[-1][2] < 45


def test_a_start_that_leaves_no_time_to_measure_is_not_begun() -> None:
    # after a's start at 16 s: a, b, sequential and generate need 16 s, and b's start would need 11 s
    made, ways, _ = turns(seconds=40, a=10.0, b=10.0)
    made.run((1,), repeats=1)
    assert ways["b"].calls == 0 and measured(made)["a, 1 new tokens"] == 1
    (left,) = made.left_out
    assert left.what == "b, 1 new tokens"
    assert left.why.endswith("24 s of 40 s are left, and its start and a round of what has started need about 27 s")


def test_a_way_that_seemed_to_have_no_time_starts_once_a_round_is_known() -> None:
    made, ways, told = turns(seconds=270, a=10.0, b=10.0)
    slow = ways["generate"].__call__

    def cold(work: Workload) -> Any:
        made.budget.now.now += 0 if ways["generate"].calls else 56  # type: ignore[attr-defined]
        return slow(work)

    made.runners["generate"] = cold  # 60 s for the reference: four rounds like that, and b has no time
    made.run((1,), repeats=1)
    assert list(measured(made).values()) == [1, 2, 1, 1] and not made.left_out
    assert [name for name, _, _ in told[-2:]] == ["sequential", "b"], "compared with a round of its own"


@pytest.mark.parametrize(("tells", "rounds"), [(False, [1, 2, 1]), (True, [1, 1, 1])])
def test_a_warm_up_with_all_requests_says_what_a_round_takes(
    monkeypatch: pytest.MonkeyPatch, tells: bool, rounds: list[int]
) -> None:
    """So that a cold reference makes no way seem too slow: else `a` starts late, with a further round beside it."""
    monkeypatch.setattr(type(EXPERIMENT), "warm_up", lambda self, output, _: self.workload(output))
    made, ways, _ = turns(seconds=330, together=True, a=10.0)

    def cold(work: Workload) -> Any:
        made.budget.now.now += 0 if ways["generate"].calls else 60  # type: ignore[attr-defined]
        return ways["generate"](work)

    def timed(work: Workload) -> Any:
        begun = ways["sequential"].clock.now
        figures, tokens = ways["sequential"](work)
        return figures | {"duration": ways["sequential"].clock.now - begun}, tokens

    made.runners["generate"] = cold  # 64 s for the reference, where a round takes 4
    if tells:
        made.runners["sequential"] = timed
    made.run((1,), repeats=1)
    assert list(measured(made).values()) == rounds


def test_ways_that_were_launched_together_start_side_by_side() -> None:
    # launched by 24 s; warm-ups of 1 s; rounds of 4 s each: 44 s. One after the other they would be thought to need 58
    made, ways, _ = turns(seconds=47, together=True, a=10.0, b=10.0)
    made.run((1,), repeats=1)
    assert [ways[name].calls for name in "ab"] == [2, 2] and not made.left_out
    made, ways, told = turns(seconds=25, together=True, a=10.0, b=10.0)
    made.run((1,), repeats=1)
    assert ways["a"].start == 0.0 and ways["b"].start == 10.0, "b was not launched: there was no time left for it"
    assert any(left.what.startswith("b,") for left in made.left_out) and told[-1][2] < 25


def test_another_length_is_estimated_by_the_reference_and_left_out_whole() -> None:
    made, ways, _ = turns(seconds=60, a=0.0)
    made.run((1, 100), repeats=1)
    assert [left.what for left in made.left_out] == [f"{name}, 100 new tokens" for name in ways]
    assert all("needs about 400 s" in left.why for left in made.left_out)
    assert set(measured(made).values()) == {1} and len(made.rows) == 3


def test_no_round_without_what_the_others_are_compared_with() -> None:
    made, ways, _ = turns(seconds=100, rates=(Rate(0.1),), a=0.0)
    ways["sequential"].each = 10.0  # a round of it takes 40 s, and would take as long once more
    made.run((1,), repeats=2)
    rounds = measured(made)
    assert rounds["sequential, 1 new tokens"] == rounds["a, 1 new tokens"] == 1
    assert len({left.why for left in made.left_out if left.what.endswith("tokens")}) == 1


def test_a_time_that_is_over_leaves_everything_out() -> None:
    made, ways, _ = turns(seconds=10, rates=(Rate(0.5, of_served=True),), a=0.0)
    made.budget.now.now = 11.0  # type: ignore[attr-defined]
    made.run((1,), repeats=1)
    assert not made.rows and not ways["generate"].calls and len(made.left_out) == 5
    assert made.left_out[-1].what == "a, 1 new tokens, 0.5 × what sequential serves"


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none(wrong: float) -> None:
    with pytest.raises(RequestError, match="give a time in seconds"):
        Budget(wrong)


def test_a_way_that_does_not_start_is_not_tried_again() -> None:
    made, ways, _ = turns(a=0.0, b=0.0)
    ways["a"].fails = lambda call: LaneError("under MPS with 75 % of the GPU, 20 of 27 products come out wrong")
    ways["b"].fails = lambda call: HardwareError("8 × 1 GiB, and 2 GiB are free")
    made.run((1, 2), repeats=1)
    assert list(made.skipped) == ["a", "b, 1 new tokens", "b, 2 new tokens"], "another length may have room"
    assert "75 %" in made.skipped["a"] and not made.left_out
    assert list(measured(made)) == [f"{name}, {n} new tokens" for n in (1, 2) for name in ("generate", "sequential")]


def test_a_way_that_fails_in_a_round_ends_alone() -> None:
    made, ways, _ = turns(rates=(Rate(2.0),), a=0.0, b=0.0)
    ways["a"].fails = lambda call: LaneError("process 0 was killed") if call == 3 else None
    made.run((1,), repeats=2)
    assert measured(made)["a, 1 new tokens"] == 1 and measured(made)["b, 1 new tokens, 2 requests/s"] == 2
    assert [(left.what, left.why) for left in made.left_out] == [
        ("a, 1 new tokens", "process 0 was killed"),
        ("a, 1 new tokens, 2 requests/s", "process 0 was killed"),
    ]


def test_after_each_measurement_there_is_something_to_keep() -> None:
    made, _, _ = turns(a=0.0)
    kept: list[tuple[int, int]] = []
    made.run((1,), repeats=2, written=lambda: kept.append((sum(r.repeats for r in made.rows), len(made.left_out))))
    assert kept == [(0, 3), (1, 3), (2, 3), (3, 3), (4, 2), (5, 1), (6, 0)]
    assert "not measured yet" in turns(a=0.0)[0]._missing


@pytest.mark.parametrize(
    ("error", "why"), [(KeyboardInterrupt(), "interrupted"), (HardwareError("no GPU\nmore"), "ended first: no GPU")]
)
def test_what_ends_a_run_leaves_what_was_measured(error: BaseException, why: str) -> None:
    made, ways, _ = turns(a=0.0)
    ways["sequential"].fails = lambda call: error if call == 2 else None
    kept: list[str] = []
    with pytest.raises(type(error)):
        made.run((1,), repeats=2, written=lambda: kept.append("; ".join(left.why for left in made.left_out)))
    assert set(measured(made).values()) == {1} and len(made.rows) == len(made.left_out) == 3
    assert why in kept[-1] and "more" not in kept[-1]


def test_a_round_that_was_not_checked_is_not_kept() -> None:
    made, _, _ = turns(a=0.0)

    def interrupted(number: int, ours: tuple[int, ...]) -> Any:
        raise KeyboardInterrupt

    begin = made._begin

    def spoiled(output: int) -> list[str]:
        ready = begin(output)
        made._checks[output] = interrupted
        return ready

    made._begin = spoiled  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.run((1,), repeats=1)
    assert not made.rows


def test_the_pace_is_that_of_this_run() -> None:
    pace = Pace()
    assert pace.start() == pace.reference(12) == pace.round("a", 12) == 0.0, "nothing is known"
    pace.reference_took(12, 2.0)
    assert pace.reference(128) == pytest.approx(2.0 * 128 / 12) and pace.reference(6) == 2.0
    assert pace.round("a", 12) == 2.0, "as the reference"
    pace.round_took("sequential", 12, None, 1.5)
    assert pace.round("a", 12) == 1.5, "as sequential, which was warm"
    pace.round_took("a", 12, None, 1.0)
    pace.reference_took(128, 10.0)
    assert pace.round("a", 12) == 1.0 and pace.round("a", 128) == pytest.approx(5.0)
    assert pace.round("a", 12, "5/s", 30.0) == 30.0, "not before the last request has come"
    pace.round_took("a", 12, "5/s", 31.0)
    assert pace.round("a", 12, "5/s", 30.0) == 31.0
    for seconds in (20.0, 50.0, 1.0):
        pace.start_took(seconds)
    assert pace.start() == 50.0
