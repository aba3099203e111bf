"""Workloads: generators keep what they promise, and refuse what makes no sense.

The published figures of the Azure traces stand here as numbers, so that no test needs the traces.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.measure.workload import Arrival, Workload, distance

PUBLISHED = {
    "conv": {
        "input_tokens_p50": 1020,
        "input_tokens_mean": 1155,
        "input_tokens_p95": 4083,
        "output_tokens_p50": 129,
        "output_tokens_mean": 211,
        "output_tokens_p95": 451,
        "requests_per_s": 5.5,
        "interarrival_cv": 1.09,
    },
    "code": {
        "input_tokens_p50": 1469,
        "input_tokens_mean": 2048,
        "input_tokens_p95": 7303,
        "output_tokens_p50": 13,
        "output_tokens_mean": 28,
        "output_tokens_p95": 90,
        "requests_per_s": 2.6,
        "interarrival_cv": 13,
    },
}


def lengths(workload: Workload) -> list[tuple[object, int]]:
    return [(arrival.prompt, arrival.max_new_tokens) for arrival in workload.arrivals]


@pytest.mark.parametrize("trace", ["conv", "code"])
@pytest.mark.parametrize("seed", [0, 1])
def test_azure_has_the_published_figures_within_five_percent(trace, seed):
    figures = Workload.azure(trace, requests=20_000, seed=seed).describe()
    for name, published in PUBLISHED[trace].items():
        assert figures[name] == pytest.approx(published, rel=0.05), name


@pytest.mark.parametrize(("trace", "share"), [("conv", 0.85), ("code", 0.62)])
def test_azure_input_and_output_belong_together(trace, share):
    arrivals = Workload.azure(trace, requests=20_000).arrivals
    assert np.mean([a.prompt + a.max_new_tokens <= 2048 for a in arrivals]) == pytest.approx(share, abs=0.02)


def test_azure_conversation_answers_depend_on_the_input():
    arrivals = Workload.azure("conv", requests=20_000).arrivals
    middle = np.median([a.max_new_tokens for a in arrivals if 950 < a.prompt <= 1200])
    long = np.median([a.max_new_tokens for a in arrivals if a.prompt > 3000])
    assert middle > 3 * long  # about 400 and 65 tokens in the trace


@pytest.mark.parametrize("trace", ["conv", "code"])
def test_a_small_azure_sample_has_the_shape_of_a_large_one(trace):
    apart = distance(Workload.azure(trace, requests=200, seed=3), Workload.azure(trace, requests=20_000))
    assert max(apart["input"], apart["output"], apart["total"]) < 0.05


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: Workload.azure("conv", seed=seed),
        lambda seed: Workload.azure("code", seed=seed),
        lambda seed: Workload.poisson(3, seed=seed),
        lambda seed: Workload.closed(5, seed=seed),
    ],
)
def test_a_seed_gives_the_same_workload_and_another_seed_another(make: Callable[[int], Workload]):
    assert make(7) == make(7)
    assert make(7).requests(1000) == make(7).requests(1000)
    assert make(7).requests(1000) != make(8).requests(1000)


def test_changing_the_gaps_leaves_lengths_and_prompts_alone():
    slow, fast = Workload.azure("code", rate=1), Workload.azure("code", rate=10)
    assert lengths(slow) == lengths(fast)
    assert [r.prompt for r in slow.requests(500)] == [r.prompt for r in fast.requests(500)]


def test_rate_holds_exactly_and_the_first_request_comes_at_once():
    for workload in (Workload.poisson(4.0, requests=50), Workload.azure("code", rate=4.0, requests=50)):
        assert workload.describe()["requests_per_s"] == pytest.approx(4.0)
        assert workload.arrivals[0].arrival_s == 0
        assert [a.arrival_s for a in workload.arrivals] == sorted(a.arrival_s for a in workload.arrivals)
    assert Workload.poisson(4.0, requests=1).arrivals[0].arrival_s == 0
    assert len(Workload.azure("conv", requests=1)) == 1


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_sets_the_cv_of_the_gaps(burstiness):
    figures = Workload.poisson(10, requests=20_000, burstiness=burstiness).describe()
    assert figures["interarrival_cv"] == pytest.approx(burstiness**-0.5, rel=0.05)


def test_closed_batches_arrive_at_once_and_run_to_their_full_length():
    requests = Workload.closed(3, prompt_tokens=5, output_tokens=7).requests(100)
    assert [(r.arrival_s, len(r.prompt), r.max_new_tokens, r.ignore_eos) for r in requests] == [(0, 5, 7, True)] * 3
    assert requests[0].prompt != requests[1].prompt


def test_own_prompts_pass_unchanged_and_may_stop():
    requests = Workload.closed(["Hello", [1, 2, 3], np.array([4, 5])], output_tokens=9).requests(100, max_tokens=4)
    assert [r.prompt for r in requests] == ["Hello", [1, 2, 3], [4, 5]]
    assert [(r.max_new_tokens, r.ignore_eos) for r in requests] == [(9, False)] * 3
    assert Workload.closed(["Hello"], ignore_eos=True).requests(100)[0].ignore_eos


def test_poisson_takes_own_prompts_in_turn():
    requests = Workload.poisson(5, requests=5, prompts=["a", "b"]).requests(100)
    assert [r.prompt for r in requests] == ["a", "b", "a", "b", "a"]
    assert not any(r.ignore_eos for r in requests)


def test_random_prompts_avoid_the_first_ids_where_the_vocabulary_allows():
    def ids(vocab_size: int) -> set[int]:
        return {i for r in Workload.closed(20, 200).requests(vocab_size) for i in r.prompt}

    assert (min(ids(50)), max(ids(50))) == (10, 49)
    assert (min(ids(6)), max(ids(6))) == (3, 5)
    assert ids(1) == {0}


@pytest.mark.parametrize("max_tokens", [2, 3, 100, 2048])
def test_requests_fit_the_context_with_a_token_in_and_one_out(max_tokens):
    for request in Workload.azure("conv", requests=300).requests(1000, max_tokens):
        assert len(request.prompt) >= 1
        assert request.max_new_tokens >= 1
        assert len(request.prompt) + request.max_new_tokens <= max_tokens


def test_fitting_keeps_proportions_and_leaves_short_requests_alone():
    workload = Workload("mine", (Arrival(0, 3000, 1000), Arrival(1, 40, 20)))
    requests = workload.requests(1000, max_tokens=400)
    assert [(len(r.prompt), r.max_new_tokens) for r in requests] == [(300, 100), (40, 20)]
    assert requests[1].prompt == workload.requests(1000)[1].prompt


def test_arrivals_are_sorted_by_time():
    workload = Workload("mine", (Arrival(2, "late", 1), Arrival(0.5, "early", 1)))
    assert [r.prompt for r in workload.requests(10)] == ["early", "late"]


def test_scaled_at_rate_and_head():
    workload = Workload("mine", (Arrival(0, 1000, 100), Arrival(1, 4, 2), Arrival(4, "text", 50)))
    assert lengths(workload.scaled(0.1)) == [(100, 10), (1, 1), ("text", 5)]
    assert [a.arrival_s for a in workload.at_rate(1.0).arrivals] == [0, 0.5, 2]
    assert lengths(workload.head(2)) == lengths(workload)[:2]
    assert len(workload.head(99)) == 3
    random = Workload.azure("conv", requests=20)
    assert random.head(5).requests(1000) == random.requests(1000)[:5]


def test_describe_by_hand():
    figures = Workload("mine", (Arrival(0, 10, 1), Arrival(1, 20, 2), Arrival(4, 60, 3))).describe()
    assert figures["name"] == "mine"
    assert figures["requests"] == 3
    assert figures["duration_s"] == 4
    assert figures["requests_per_s"] == 0.5
    assert figures["interarrival_cv"] == 0.5  # gaps of 1 and 3: mean 2, standard deviation 1
    assert [figures[f"input_tokens_{f}"] for f in ("p50", "mean", "p95", "max")] == [20, 30, 56, 60]
    assert [figures[f"output_tokens_{f}"] for f in ("p50", "mean", "max")] == [2, 2, 3]
    json.dumps(figures)


def test_describe_and_repr_leave_out_what_does_not_exist():
    figures = Workload.closed(["some text"]).describe()
    assert figures["requests_per_s"] is figures["interarrival_cv"] is figures["input_tokens_p50"] is None
    assert repr(Workload.closed(["some text"])) == "<Workload 'closed': 1 requests, all at once; text in, 32 out>"
    assert "'azure conv': 200 requests, 5.5/s" in repr(Workload.azure("conv"))


@pytest.mark.parametrize(("pipeline", "expected"), [("hf", (20, 1024, 12)), ("vllm", (512, 1024, 1024))])
def test_the_papers_workloads(pipeline, expected):
    workload = Workload.paper(pipeline)
    assert (len(workload), *lengths(workload)[0]) == expected
    assert workload.ignore_eos
    assert workload.describe()["duration_s"] == 0
    assert len(Workload.paper(pipeline, requests=3)) == 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Workload.poisson(0), "rate is 0"),
        (lambda: Workload.poisson(-2.5), "rate is -2.5"),
        (lambda: Workload.poisson(float("inf")), "rate is inf.*Workload.closed"),
        (lambda: Workload.poisson(float("nan")), "rate is nan"),
        (lambda: Workload.poisson("fast"), "rate is 'fast'"),
        (lambda: Workload.poisson(1, burstiness=0), "burstiness is 0"),
        (lambda: Workload.poisson(1, burstiness=1e-9), "burstiness is too small"),
        (lambda: Workload.poisson(1, requests=0), "requests is 0"),
        (lambda: Workload.poisson(1, requests=2.5), "requests is 2.5"),
        (lambda: Workload.poisson(1, prompt_tokens=0), "prompt's length in tokens is 0"),
        (lambda: Workload.poisson(1, output_tokens=-1), "output's length in tokens .* is -1"),
        (lambda: Workload.poisson(1, seed=-1), "seed is -1"),
        (lambda: Workload.poisson(1, seed=0.5), "seed is 0.5"),
        (lambda: Workload.poisson(1, prompts=[]), "list of prompts is empty"),
        (lambda: Workload.closed(0), "requests is 0"),
        (lambda: Workload.closed([]), "list of prompts is empty"),
        (lambda: Workload.closed("hello"), "'hello'.*in a list"),
        (lambda: Workload.closed(None), "None is neither"),
        (lambda: Workload.closed([None]), "a prompt is None"),
        (lambda: Workload.closed([1, 2, 3]), "a prompt is 1"),
        (lambda: Workload.closed([[1.5]]), r"a prompt is \[1.5\]"),
        (lambda: Workload.closed([""]), "a prompt is ''"),
        (lambda: Workload.closed([[]]), r"a prompt is \(\)"),
        (lambda: Workload.closed(1, output_tokens=0), "output's length in tokens .* is 0"),
        (lambda: Workload.azure("chat"), "unknown trace 'chat'.*'conv' and 'code'"),
        (lambda: Workload.azure(["conv"]), "unknown trace"),
        (lambda: Workload.azure("conv", rate=0), "rate is 0"),
        (lambda: Workload.azure("conv", requests=0), "requests is 0"),
        (lambda: Workload.paper("jax"), "unknown pipeline 'jax'.*'hf' and 'vllm'"),
        (lambda: Workload.paper("hf", requests=0), "requests is 0"),
        (lambda: Workload.from_csv("x.csv", requests=0), "requests is 0"),
        (lambda: Workload("none", ()), "'none' has no requests"),
        (lambda: Arrival(-1, 5, 5), "arrival_s is -1"),
        (lambda: Arrival("now", 5, 5), "arrival_s is 'now'"),
        (lambda: Arrival(0, [1, 2], 5), r"a prompt is \[1, 2\]"),
        (lambda: Workload.closed(1).requests(0), "vocab_size is 0"),
        (lambda: Workload.closed(1).requests(10, max_tokens=1), "max_tokens is 1"),
        (lambda: Workload.closed(1).scaled(0), "tokens is 0"),
        (lambda: Workload.closed(2).at_rate(1), "arrive at once.*Workload.poisson"),
        (lambda: Workload.poisson(1).at_rate(0), "requests_per_s is 0"),
        (lambda: Workload.poisson(1).head(0), "n is 0"),
        (lambda: distance(Workload.closed(1), Workload.closed(["text"])), "text of unknown length"),
    ],
)
def test_bad_arguments_are_refused_with_the_value_seen(call, says):
    with pytest.raises(WorkloadError, match=says):
        call()


def test_distance_of_a_workload_from_itself_and_from_others():
    workload = Workload.azure("conv", requests=500)
    assert distance(workload, workload) == {"input": 0, "output": 0, "total": 0, "gaps": 0}
    assert distance(workload, workload.at_rate(50))["gaps"] == pytest.approx(0, abs=0.01)
    apart = distance(workload, Workload.azure("code", requests=500))
    assert all(0.1 < value <= 1 for value in apart.values())
    assert distance(Workload.closed(3), Workload.closed(5)) == {"input": 0, "output": 0, "total": 0, "gaps": 0}
    assert distance(Workload.closed(3, 10), Workload.closed(3, 20))["input"] == 1


def test_distance_by_hand():
    a = Workload("a", tuple(Arrival(0, length, 1) for length in (1, 2, 3, 4)))
    b = Workload("b", tuple(Arrival(0, length, 1) for length in (3, 4, 5, 6)))
    assert distance(a, b)["input"] == distance(b, a)["input"] == 0.5
