"""A lane that is given the next batch before the last one's tokens were read, as GPU lanes are."""

from __future__ import annotations

import random
from typing import Any

import pytest

from splitwiser_lab.engine.core import Core
from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request, Sampling
from splitwiser_lab.engine.scheduler import Limits, Policy, decode_only, mixed, prefill_first, prefill_only
from splitwiser_lab.engine.station import ModeSwitch, Station
from splitwiser_lab.errors import LaneError
from splitwiser_lab.model.batch import PENDING, Batch, BatchResult, Sequence
from splitwiser_lab.timeline import ModeChange

PAGE = 4


def successor(history: list[int]) -> int:
    """The fake model: the next token depends on every token before it."""
    return sum((i + 1) * t for i, t in enumerate(history)) % 97


def alone(prompt: list[int], new: int, stop: int | None = None) -> list[int]:
    """What the fake model generates for one request."""
    history = list(prompt)
    while len(history) < len(prompt) + new:
        history.append(successor(history))
        if history[-1] == stop:
            break
    return history[len(prompt) :]


class LateLane:
    """Computes `late` polls after submission, in order, in pages shared by all lanes.

    A token that is read from a page that another wrote over meanwhile comes out wrong.
    """

    def __init__(self, name: str, pool: dict[int, int], depth: int = 2, late: int = 2) -> None:
        self.name, self.cores, self.depth, self.late = name, [], depth, late
        self.pool, self.board = pool, dict[int, int]()
        self.batches: list[Batch] = []
        self.under_way, self.most_under_way, self.pending = 0, 0, 0
        self.fail_at: dict[int, BaseException] = {}

    def start(self) -> None: ...

    def close(self) -> None:
        self.under_way = 0

    def submit(self, batch: Batch) -> LateTicket:
        self.batches.append(batch)
        if error := self.fail_at.pop(len(self.batches), None):
            raise error
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return LateTicket(self, batch)

    def run(self, sequence: Sequence) -> int | None:
        tokens, key = list(sequence.tokens), sequence.block_table[0]
        if tokens == [PENDING]:
            self.pending += 1
            tokens = [self.board[key]]
        assert PENDING not in tokens
        place = [page * PAGE + row for page in sequence.block_table for row in range(PAGE)]
        self.pool.update(zip(place[sequence.start : sequence.context], tokens, strict=True))
        if sequence.sampling is None:
            return None
        self.board[key] = successor([self.pool[slot] for slot in place[: sequence.context]])
        return self.board[key]


class LateTicket:
    def __init__(self, lane: LateLane, batch: Batch) -> None:
        self.lane, self.batch, self.polls = lane, batch, lane.late

    def done(self) -> bool:
        self.polls -= 1
        return self.polls < 0

    def result(self) -> BatchResult:
        self.lane.under_way -= 1
        return BatchResult([self.lane.run(sequence) for sequence in self.batch.sequences], 0.0, 1.0)

    def connection(self) -> None:
        return None


class Rig:
    """A core over late lanes; `stop` ends a request when its token comes."""

    def __init__(self, pages: int = 64, stop: int | None = None) -> None:
        self.pool: dict[int, int] = {}
        self.stop = stop
        self.core = Core(PageAllocator(pages, PAGE), Limits(8, 40, 12), self.ends)
        self.lanes: list[LateLane] = []
        self.flip("sequential", main=prefill_first)

    def ends(self, request: Request) -> Any:
        if request.output[-1] == self.stop:
            return "stop"
        return "length" if len(request.output) >= request.sampling.max_new_tokens else None

    def flip(self, mode: str, **policies: Policy) -> None:
        lanes = [LateLane(name, self.pool) for name in policies]
        self.lanes += lanes
        stations = [Station(lane, policy) for lane, policy in zip(lanes, policies.values(), strict=True)]
        self.core.switch(ModeSwitch(ModeChange(0.0, mode), stations, self.core.scheduler.limits, {}))

    def run(self, requests: list[Request]) -> None:
        for request in requests:
            self.core.add(request)
        self.core.drive(lambda: self.core.quiet)
        assert self.core.scheduler.pages.free == self.core.scheduler.pages.pages
        assert not self.core.scheduler.leaving and not any(lane.under_way for lane in self.lanes)


def requests(*lengths: int, new: int = 12, **settings: Any) -> list[Request]:
    draw = random.Random(5)
    prompts = [[draw.randrange(97) for _ in range(length)] for length in lengths]
    return [Request(i, prompt, Sampling(max_new_tokens=new), 0.0, **settings) for i, prompt in enumerate(prompts)]


def check(ours: list[Request], stop: int | None = None) -> None:
    for request in ours:
        assert request.output == alone(request.prompt, request.sampling.max_new_tokens, stop)


MODES: dict[str, dict[str, Policy]] = {
    "sequential": {"main": prefill_first},
    "chunked": {"main": mixed},
    "split": {"prefill": prefill_only, "decode": decode_only},
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_stay_on_the_lane_and_are_the_same(mode: str) -> None:
    rig = Rig()
    rig.flip(mode, **MODES[mode])
    ours = requests(5, 17, 1, 30, 9)
    rig.run(ours)
    check(ours)
    assert max(lane.most_under_way for lane in rig.lanes) == 2
    assert sum(lane.pending for lane in rig.lanes) > 20, "most tokens were asked for before their ancestors were read"


def test_no_token_beyond_the_length_is_asked_for() -> None:
    rig = Rig()
    ours = requests(5, 9, 3, new=7)
    rig.run(ours)
    asked = sum(s.sampling is not None for b in rig.lanes[0].batches for s in b.sequences)
    assert asked == 3 * 7


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_in_mid_run_costs_one_row_and_no_page(mode: str) -> None:
    """What ran ahead of a stop is dropped; its pages are given to nobody until the lane is done with them."""
    ours = requests(5, 17, 11, 30, 9, 22, 14, new=25)
    stop = next(t for t in alone(ours[0].prompt, 25)[3:])
    rig = Rig(pages=30, stop=stop)
    rig.flip(mode, **MODES[mode])
    rig.run(ours)
    check(ours, stop)
    stopped = [r for r in ours if r.finish_reason == "stop"]
    assert stopped
    asked = sum(s.sampling is not None for lane in rig.lanes for b in lane.batches for s in b.sequences)
    wasted = asked - sum(len(r.output) for r in ours)
    assert 0 < wasted <= len(stopped)


@pytest.mark.parametrize("mode", MODES)
def test_too_few_pages(mode: str) -> None:
    """The oldest must be able to preempt, although the younger are always under way."""
    rig = Rig(pages=14)
    rig.flip(mode, **MODES[mode])
    ours = requests(5, 17, 11, 9, 22, new=20)
    rig.run(ours)
    check(ours)
    assert sum(r.preemptions for r in ours) > 0
    assert ours[0].preemptions == 0


def test_cancelled_from_its_own_token_it_has_no_more() -> None:
    rig = Rig()

    def listen(request: Request, token: int) -> None:
        if request.id == 1 and len(request.output) == 6:
            rig.core.cancel(request)

    ours = requests(5, 17, 11, on_token=listen)
    rig.run(ours)
    expected = [alone(r.prompt, 12) for r in ours]
    assert [r.output for r in ours] == [expected[0], expected[1][:6], expected[2]]
    assert ours[1].finish_reason == "cancelled"


def test_flips_wait_for_everything_under_way() -> None:
    rig = Rig()
    modes = iter([mode for _ in range(4) for mode in MODES])

    def listen(request: Request, token: int) -> None:
        if request.id == 0 and len(request.output) % 3 == 0 and (mode := next(modes, None)):
            rig.flip(mode, **MODES[mode])

    ours = requests(5, 17, 11, 30, 9, new=30, on_token=listen)
    rig.run(ours)
    check(ours)
    assert len(rig.core.modes) > 6


@pytest.mark.parametrize("at", range(2, 9))
def test_a_batch_that_is_refused_costs_its_requests_only(at: int) -> None:
    """Their batch that is still under way is dropped, and their pages come back after it."""
    rig = Rig()
    rig.lanes[0].fail_at[at] = LaneError("refused")
    ours = requests(5, 17, 30, 28)
    rig.run(ours)
    failed = [r for r in ours if r.finish_reason == "error"]
    assert failed
    check([r for r in ours if r not in failed])
    for r in failed:
        assert r.output == alone(r.prompt, 12)[: len(r.output)]


@pytest.mark.parametrize("at", range(2, 9))
def test_an_interrupt_leaves_nothing_under_way(at: int) -> None:
    rig = Rig()
    rig.lanes[0].fail_at[at] = KeyboardInterrupt()
    ours = requests(5, 17, 30, 28)
    with pytest.raises(KeyboardInterrupt):
        rig.run(ours)
    assert not any(r.under_way for r in ours)
    rig.run([])
    check(ours)
