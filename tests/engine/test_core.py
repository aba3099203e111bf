"""The loop over lanes made for the test, whose batches end when the test says so."""

from __future__ import annotations

from typing import Any

import pytest

from splitwiser_lab.engine.core import Core
from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request, Sampling
from splitwiser_lab.engine.scheduler import Limits, Policy, decode_only, prefill_first, prefill_only
from splitwiser_lab.engine.station import ModeSwitch, Station
from splitwiser_lab.errors import LaneError, SplitwiserError
from splitwiser_lab.lanes.base import wait_any
from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.timeline import ModeChange

LIMITS = Limits(max_requests=8, prefill_tokens=64, chunk_tokens=16)


class FakeTicket:
    """Gives each sequence the token that counts its context; `ready` may be held back, an error put in its place."""

    def __init__(self, batch: Batch, lane: FakeLane) -> None:
        self.batch, self.lane = batch, lane
        self.ready = not lane.held
        self.error: BaseException | None = None

    def done(self) -> bool:
        if not self.ready and self.lane.release_when_asked:
            self.ready = True
            return False
        return self.ready

    def result(self) -> BatchResult:
        if self.error:
            raise self.error
        return BatchResult([None if s.sampling is None else s.context for s in self.batch.sequences], 0.0, 1.0)

    def connection(self) -> None:
        return None


class FakeLane:
    """Remembers its batches. `fail_next` is raised by the next submit; `held` batches wait for the test."""

    def __init__(self, name: str, depth: int = 1) -> None:
        self.name, self.cores, self.depth = name, [], depth
        self.held, self.release_when_asked, self.closed = False, False, 0
        self.fail_next: BaseException | None = None
        self.tickets: list[FakeTicket] = []

    def start(self) -> None: ...

    def close(self) -> None:
        self.closed += 1

    def submit(self, batch: Batch) -> FakeTicket:
        if self.fail_next:
            error, self.fail_next = self.fail_next, None
            raise error
        self.tickets.append(FakeTicket(batch, self))
        return self.tickets[-1]


def switch(mode: str, *stations: tuple[FakeLane, Policy], cores: dict[str, list[int]] | None = None) -> ModeSwitch:
    return ModeSwitch(ModeChange(0.0, mode), [Station(lane, policy) for lane, policy in stations], LIMITS, cores or {})


def request(number: int, prompt: int = 5, new: int = 4, **settings: Any) -> Request:
    return Request(number, [1] * prompt, Sampling(max_new_tokens=new), 0.0, **settings)


@pytest.fixture
def main() -> FakeLane:
    return FakeLane("main")


@pytest.fixture
def core(main: FakeLane) -> Core:
    def ends(request: Request) -> Any:
        return "length" if len(request.output) >= request.sampling.max_new_tokens else None

    core = Core(PageAllocator(16, 4), LIMITS, ends)
    core.switch(switch("sequential", (main, prefill_first)))
    return core


def run(core: Core, *requests: Request) -> None:
    for each in requests:
        core.add(each)
    core.drive(lambda: core.quiet)


def test_requests_run_to_their_end(core: Core, main: FakeLane) -> None:
    requests = [request(0), request(1, prompt=9, new=1), request(2, prompt=1)]
    run(core, *requests)
    assert [r.output for r in requests] == [[5, 6, 7, 8], [9], [1, 2, 3, 4]]
    assert [t.batch.phase for t in main.tickets] == ["prefill", "decode", "decode", "decode"]
    assert core.scheduler.pages.free == 16


def test_a_failed_submit_costs_its_batch_only(core: Core, main: FakeLane) -> None:
    core.scheduler.limits = Limits(8, 5, 16)  # one prompt a batch
    requests = [request(0), request(1), request(2)]
    main.fail_next = LaneError("lane 'main' is dead")
    run(core, *requests)
    assert [r.finish_reason for r in requests] == ["error", "length", "length"]
    assert str(requests[0].error) == "lane 'main' is dead"
    assert core.scheduler.pages.free == 16


@pytest.mark.parametrize("where", ["submit", "result"])
def test_an_interrupt_leaves_nothing_half_way(core: Core, main: FakeLane, where: str) -> None:
    """The lane is closed, as its answer would be taken for that of the next batch; requests stay to be run again."""
    requests = [request(0), request(1, prompt=7)]
    if where == "submit":
        main.fail_next = KeyboardInterrupt()
    else:
        main.held = True
        for each in requests:
            core.add(each)
        core.step(timeout=0)
        main.held, main.tickets[0].ready, main.tickets[0].error = False, True, KeyboardInterrupt()
        requests_already_in = requests
        requests = []
    with pytest.raises(KeyboardInterrupt):
        run(core, *requests)
    assert main.closed == 1
    requests = requests or requests_already_in
    assert not any(r.under_way or r.done for r in requests)
    run(core)
    assert [r.output for r in requests] == [[5, 6, 7, 8], [7, 8, 9, 10]]


def test_lanes_drain_before_the_mode_changes(core: Core) -> None:
    prefill, decode, main = FakeLane("prefill"), FakeLane("decode"), FakeLane("main")
    core.switch(switch("split", (prefill, prefill_only), (decode, decode_only), cores={"decode": [1], "prefill": [0]}))
    assert core.mode.mode == "split"
    assert (prefill.cores, decode.cores) == ([0], [1])
    prefill.held = True
    core.add(request(0, new=3))
    core.step(timeout=0)
    core.switch(switch("sequential", (main, prefill_first)))
    core.step(timeout=0)
    assert core.mode.mode == "split" and not main.tickets, "a batch is still under way on the old lane"
    prefill.tickets[0].ready = True
    core.drive(lambda: core.quiet)
    assert core.mode.mode == "sequential"
    assert [len(lane.tickets) for lane in (prefill, decode, main)] == [1, 0, 2]


def test_a_change_that_waits_for_the_last_batch_is_not_forgotten(core: Core, main: FakeLane) -> None:
    """The step that finishes the last request is not followed by another: the change must be made all the same."""
    main.held = True
    last = request(0, new=1)
    core.add(last)
    core.step(timeout=0)
    core.switch(switch("other", (FakeLane("other"), prefill_first)))
    core.step(timeout=0)
    main.release_when_asked = True
    core.drive(lambda: last.done)
    assert last.done
    assert core.mode.mode == "other"


def test_the_newest_change_wins(core: Core, main: FakeLane) -> None:
    main.held = True
    core.add(request(0))
    core.step(timeout=0)
    for name in ("a", "b", "c"):
        core.switch(switch(name, (FakeLane(name), prefill_first)))
    main.tickets[0].ready = True
    core.drive(lambda: core.quiet)
    assert [change.mode for change in core.modes] == ["sequential", "c"]


def test_two_lanes_work_at_the_same_time(core: Core) -> None:
    prefill, decode = FakeLane("prefill"), FakeLane("decode")
    core.switch(switch("split", (prefill, prefill_only), (decode, decode_only)))
    core.add(request(0, new=10))
    core.step()
    prefill.held = True
    core.add(request(1, prompt=30, new=1))
    for _ in range(4):
        core.step()
    assert len(decode.tickets) >= 4, "decode goes on while a long prompt is prefilled"
    prefill.tickets[-1].ready = True
    core.drive(lambda: core.quiet)


def test_requests_no_lane_can_run_are_reported_not_waited_for(core: Core) -> None:
    core.switch(switch("broken", (FakeLane("decode"), decode_only)))
    with pytest.raises(SplitwiserError, match=r"requests \[7\] are left"):
        run(core, request(7))


def test_a_listener_that_interrupts_loses_no_one_elses_token(core: Core) -> None:
    def listen(request: Request, token: int) -> None:
        if len(request.output) == 2:
            request.on_token = None
            raise KeyboardInterrupt

    requests = [request(0, on_token=listen), request(1), request(2)]
    with pytest.raises(KeyboardInterrupt):
        run(core, *requests)
    assert [len(r.output) for r in requests] == [2, 2, 2]
    run(core)
    assert [r.output for r in requests] == [[5, 6, 7, 8]] * 3


def test_waiting_for_any_ends_with_the_first_or_with_time(main: FakeLane) -> None:
    main.held = True
    slow, quick = FakeTicket(Batch([], []), main), FakeTicket(Batch([], []), main)
    wait_any([slow, quick], timeout=0.01)
    quick.ready = True
    wait_any([slow, quick])
