"""What `auto` makes of loads whose best answer is known, on a simulated device with the speeds of an H200."""

from __future__ import annotations

import random

import pytest
from simulated_device import Arrival, Device, Run, Truth, simulate

from splitwiser_lab.engine.choices import _PRIORS, TURNS, partition_prior
from splitwiser_lab.engine.controller import Candidate, Line, Shares

CHUNKED = [Candidate("chunked", "mixed", {"chunk_tokens": tokens}) for tokens in (256, 512, 768, 1024, 2048)]
PARTITIONED = [Candidate("partitioned", "split", {"decode_sms": n}, partition_prior(n / 132)) for n in (32, 48, 64)]
STREAMS = _PRIORS["streams"]
ALL = [TURNS, *CHUNKED, *PARTITIONED, STREAMS]
TRUTH: Truth = {
    PARTITIONED[0].label: Shares(0.63, 0.47),
    PARTITIONED[1].label: Shares(0.58, 0.56),
    PARTITIONED[2].label: Shares(0.49, 0.68),
    STREAMS.label: Shares(0.78, 0.27),
}


def eight_b() -> Device:
    return Device(prefill=Line(1e-3, 24e-6), decode=Line(5.2e-3, 2.5e-5))


def one_b() -> Device:
    return Device(prefill=Line(5e-4, 3.6e-6), decode=Line(1.2e-3, 8e-6))


def poisson(rate: float, count: int, prompts: tuple[int, int], output: int, seed: int = 0) -> list[Arrival]:
    draw, at, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate)
        arrivals.append(Arrival(at, draw.randint(*prompts), max(2, round(draw.expovariate(1 / output)))))
    return arrivals


def serve(
    device: Device,
    arrivals: list[Arrival],
    limit: float | None = None,
    only: Candidate | None = None,
    truth: Truth = TRUTH,
) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        return simulate(patch, device, truth, ALL if only is None else [only], arrivals, limit)


CHAT = poisson(13.5, 150, (100, 2200), 150)


def test_under_a_limit_chat_keeps_its_pace_and_its_first_tokens_come_soon() -> None:
    turns, found = serve(eight_b(), CHAT, only=TURNS), serve(eight_b(), CHAT, limit=30)
    assert turns.itl_p99 > 45, "the load is one where taking turns breaks the limit"
    assert found.within(30) >= 0.99 > 0.3 > turns.within(30), "request by request"
    assert found.itl_p99 <= 0.5 * turns.itl_p99 and found.ttft_p50 <= 1.4 * turns.ttft_p50


def test_short_prompts_beside_a_big_batch_are_done_at_once() -> None:
    arrivals = [Arrival(0.0, 64, 1500) for _ in range(100)] + poisson(50, 100, (16, 64), 8)
    found = serve(one_b(), sorted(arrivals, key=lambda a: a.at), limit=10)
    assert found.itl_p99 <= 10
    assert found.seconds["sequential"] > 0.9 * found.ended, found.seconds


@pytest.mark.parametrize("output", [100, 600])
def test_long_prompts_at_a_high_rate_are_done_as_soon_as_in_the_best_mode(output: int) -> None:
    """The queue only grows. Beside short answers decode is worth little, and what slows prefill down loses."""
    arrivals = poisson(25, 150, (1500, 2500), output)
    fixed = {one.label: serve(eight_b(), arrivals, only=one) for one in (TURNS, CHUNKED[1], PARTITIONED[2], STREAMS)}
    free, limited = serve(eight_b(), arrivals), serve(eight_b(), arrivals, limit=30)
    assert free.ended <= 1.05 * min(run.ended for run in fixed.values())
    assert limited.ended <= 1.05 * min(run.ended for run in fixed.values() if run.within(30) >= 0.99)
    assert limited.within(30) >= 0.98 and limited.itl_max < 150 < 5000 < fixed["sequential"].itl_max


def test_a_device_kept_full_by_both_phases_is_done_sooner_than_in_any_one_mode() -> None:
    arrivals = poisson(100, 300, (1500, 2500), 400)
    fixed = {one.label: serve(one_b(), arrivals, only=one).ended for one in ALL}
    found = serve(one_b(), arrivals)
    assert found.ended <= 1.03 * min(fixed.values()), (found.ended, fixed)


def test_a_measured_loser_is_left_for_the_next_best() -> None:
    """Partitions lose here, whatever was expected of them; mixed batches do not."""
    poor = {**TRUTH, **{one.label: Shares(0.4, 0.45) for one in PARTITIONED}}
    arrivals = poisson(20, 150, (1500, 2500), 100)
    found = serve(eight_b(), arrivals, limit=30, truth=poor)
    assert max(found.seconds, key=lambda label: found.seconds[label]) == CHUNKED[2].label, found.seconds
    assert sum(found.seconds.get(one.label, 0.0) for one in PARTITIONED) < 0.2 * found.ended
    assert "(measured)" in found.governor.explain()


def test_when_one_phase_has_work_it_has_the_whole_device() -> None:
    arrivals = [*poisson(25, 20, (1500, 2500), 10), *(Arrival(5.0, 10, 400) for _ in range(8))]
    found = serve(eight_b(), arrivals, limit=30)
    late = [b - a for r in found.requests[-8:] for a, b in zip(r.token_times, r.token_times[1:], strict=False)]
    alone = eight_b().decode.at(8)
    assert sorted(late)[len(late) // 2] == pytest.approx(alone, rel=0.05)
    assert "only decode has work" in found.governor.explain()


def test_a_limit_out_of_reach_gets_what_comes_closest_and_stays_with_it() -> None:
    found = serve(eight_b(), CHAT, limit=3)
    both = {label: seconds for label, seconds in found.seconds.items() if label != "sequential"}
    assert max(both, key=lambda label: both[label]) == CHUNKED[0].label, found.seconds
    said = found.governor.explain()
    assert "no choice keeps the gap" in said
    assert found.itl_p99 < serve(eight_b(), CHAT, only=CHUNKED[1]).itl_p99


def test_prompts_that_wait_from_the_very_start_starve_nobody() -> None:
    """Cold, and prompts wait all the time: decode alone is never seen, and must not be waited for."""
    arrivals = [*(Arrival(0.0, 1000, 3000) for _ in range(32)), *(Arrival(7e-3 * n, 2000, 1) for n in range(200))]
    found, turns = serve(one_b(), arrivals), serve(one_b(), arrivals, only=TURNS)
    meanwhile = [
        sum(t < run.requests[-1].token_times[0] for t in run.requests[0].token_times) for run in (found, turns)
    ]
    assert meanwhile[1] == 1 and meanwhile[0] > 300
    assert found.ended < 0.98 * turns.ended


def test_it_explains_every_choice() -> None:
    said = serve(eight_b(), CHAT, limit=30).governor.explain()
    for one in ALL:
        assert f"- {one.label}: prefill at" in said
    assert said.count("This is the choice") == 1 and said.count("Not chosen, as") == len(ALL) - 1


def test_it_does_not_change_back_and_forth() -> None:
    found = serve(eight_b(), CHAT, limit=30)
    assert found.governor._changes <= len(found.requests), "less than there and back for each prompt"
