"""Which batch comes next: the policies on their own, without a model or a lane."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request, Sampling
from splitwiser_lab.engine.scheduler import (
    Limits,
    Policy,
    Scheduled,
    Scheduler,
    decode_only,
    mixed,
    prefill_first,
    prefill_only,
)

PAGE = 4


def scheduler_of(pages: int = 100, **limits: int) -> Scheduler:
    return Scheduler(
        PageAllocator(pages, PAGE), Limits(**{"max_requests": 8, "prefill_tokens": 32, "chunk_tokens": 10, **limits})
    )


def request(number: int, prompt: int, new: int = 20) -> Request:
    return Request(number, [number] * prompt, Sampling(max_new_tokens=new), 0.0)


def fold(scheduled: Scheduled | None) -> list[tuple[int, int]]:
    """As the engine does when a batch is done. Gives (request, tokens) of the batch, decoding ones first."""
    assert scheduled is not None
    for each, sequence in zip(scheduled.requests, scheduled.batch.sequences, strict=True):
        assert each.under_way.popleft() is sequence
        each.computed = sequence.context
        if sequence.sampling is not None:
            each.output.append(100 + len(each.output))
    return [(r.id, len(s.tokens)) for r, s in zip(scheduled.requests, scheduled.batch.sequences, strict=True)]


def test_prefill_takes_whole_prompts_up_to_the_budget_in_order() -> None:
    scheduler = scheduler_of()
    for number, length in enumerate([10, 15, 8, 2]):
        scheduler.add(request(number, length))
    assert fold(prefill_only(scheduler)) == [(0, 10), (1, 15)], "8 more are over 32, and 2 must not overtake them"
    assert fold(prefill_only(scheduler)) == [(2, 8), (3, 2)]
    assert prefill_only(scheduler) is None


def test_a_prompt_over_the_budget_goes_alone() -> None:
    scheduler = scheduler_of()
    for number, length in enumerate([50, 5]):
        scheduler.add(request(number, length))
    assert fold(prefill_only(scheduler)) == [(0, 50)]
    assert fold(prefill_only(scheduler)) == [(1, 5)]


def test_prefill_first_decodes_when_no_prompt_fits() -> None:
    scheduler = scheduler_of(max_requests=2)
    for number in range(3):
        scheduler.add(request(number, 5))
    assert fold(prefill_first(scheduler)) == [(0, 5), (1, 5)]
    assert fold(prefill_first(scheduler)) == [(0, 1), (1, 1)], "the third waits: two are the most"
    scheduler.remove(scheduler.running[0])
    assert fold(prefill_first(scheduler)) == [(2, 5)]
    assert fold(prefill_first(scheduler)) == [(1, 1), (2, 1)]


def test_mixed_puts_decode_first_and_fills_up_with_chunks() -> None:
    scheduler = scheduler_of()
    scheduler.add(request(0, 4))
    assert fold(mixed(scheduler)) == [(0, 4)]
    scheduler.add(request(1, 21))
    scheduler.add(request(2, 6))
    assert fold(mixed(scheduler)) == [(0, 1), (1, 9)]
    assert fold(mixed(scheduler)) == [(0, 1), (1, 9)]
    assert fold(mixed(scheduler)) == [(0, 1), (1, 3), (2, 6)]
    assert fold(mixed(scheduler)) == [(0, 1), (1, 1), (2, 1)]


def test_what_a_gpu_pads_decode_to_is_no_room_for_prompts() -> None:
    scheduler = scheduler_of(chunk_tokens=24, decode_step=8)
    scheduler.add(request(0, 4))
    assert fold(mixed(scheduler)) == [(0, 4)], "with nothing to decode the budget is the prompts'"
    scheduler.add(request(1, 40))
    assert fold(mixed(scheduler)) == [(0, 1), (1, 16)]


def test_chunks_ask_for_a_token_only_at_the_end_of_the_prompt() -> None:
    scheduler = scheduler_of()
    scheduler.add(request(0, 25))
    asked = []
    for _ in range(3):
        scheduled = mixed(scheduler)
        assert scheduled is not None
        asked.append(scheduled.batch.prefill[0].sampling is not None)
        fold(scheduled)
    assert asked == [False, False, True]


def test_a_decode_batch_larger_than_the_budget_leaves_a_quarter_of_it_to_prompts() -> None:
    scheduler = scheduler_of(chunk_tokens=8)
    for number in range(8):
        scheduler.add(request(number, 1))
    fold(mixed(scheduler))
    scheduler.limits = replace(scheduler.limits, max_requests=16)
    scheduler.add(request(8, 5))
    everyone = [(number, 1) for number in range(8)]
    assert fold(mixed(scheduler)) == [*everyone, (8, 2)]
    assert fold(mixed(scheduler)) == [*everyone, (8, 2)]
    assert fold(mixed(scheduler)) == [*everyone, (8, 1)]
    assert fold(mixed(scheduler)) == [*everyone, (8, 1)], "now it decodes with the others"


@pytest.mark.parametrize("policy", [prefill_only, decode_only, prefill_first, mixed])
def test_what_is_in_flight_is_left_alone(policy: Policy) -> None:
    scheduler = scheduler_of()
    scheduler.add(request(0, 30))
    assert mixed(scheduler) is not None
    assert policy(scheduler) is None


def test_the_youngest_gives_way_and_comes_back_in_its_place() -> None:
    scheduler = scheduler_of(pages=8)
    requests = [request(number, 7) for number in range(3)]
    for each in requests:
        scheduler.add(each)
    assert fold(prefill_only(scheduler)) == [(0, 7), (1, 7), (2, 7)]
    assert fold(decode_only(scheduler)) == [(0, 1), (1, 1), (2, 1)]
    assert scheduler.pages.grow(request(99, 1), 1), "of the two free pages one is left, and all three need one"
    before = [list(r.pages) for r in requests]
    assert fold(decode_only(scheduler)) == [(0, 1), (1, 1)]
    assert (requests[2].preemptions, requests[2].pages, requests[2].computed) == (1, [], 0)
    assert [r.pages[:2] for r in requests[:2]] == before[:2]
    assert list(scheduler.waiting) == [requests[2]]
    late = request(3, 1)
    scheduler.add(late)
    assert list(scheduler.waiting) == [requests[2], late]
    scheduler.remove(requests[0])
    scheduled = prefill_only(scheduler)
    assert scheduled is not None and len(requests[2].output) == 2
    assert scheduled.batch.prefill[0].tokens == requests[2].prompt + requests[2].output, "prompt and output again"
    assert [r.id for r in scheduled.requests] == [2], "no page is left for the newcomer but one that the older need"


def test_the_oldest_is_never_held_up_by_younger_ones() -> None:
    """Run to the end by one policy after another with hardly any pages: everyone finishes, in order of age."""
    for policy in (prefill_first, mixed):
        scheduler = scheduler_of(pages=6)
        requests = [request(number, 3 + number, new=8) for number in range(5)]
        for each in requests:
            scheduler.add(each)
        finished: list[int] = []
        for _ in range(500):
            if not scheduler.running and not scheduler.waiting:
                break
            fold(policy(scheduler))
            for each in list(scheduler.running):
                if len(each.output) == 8:
                    scheduler.remove(each)
                    finished.append(each.id)
        assert finished == [0, 1, 2, 3, 4]
        assert scheduler.pages.free == 6


def test_a_newcomer_does_not_take_the_last_pages() -> None:
    """It would be thrown out again at the next page that one of the running needs."""
    scheduler = scheduler_of(pages=6)
    first, second = request(0, 12), request(1, 9)
    scheduler.add(first)
    fold(prefill_only(scheduler))
    scheduler.add(second)
    assert prefill_only(scheduler) is None, "3 pages are free, all of which it needs"
    assert second.pages == []
    scheduler.remove(first)
    assert fold(prefill_only(scheduler)) == [(1, 9)]


def test_phases_of_a_request() -> None:
    each = request(0, 5)
    assert each.phase == "prefill"
    each.computed = 5
    assert each.phase == "prefill", "all of the prompt is in the pool but no token has come yet"
    each.output.append(9)
    assert each.phase == "decode"
    assert each.next_tokens(1).tokens == [9]
    each.computed = 0
    assert each.phase == "prefill"
    assert each.next_tokens(6).tokens == [0, 0, 0, 0, 0, 9]
