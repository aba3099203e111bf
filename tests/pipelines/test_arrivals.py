"""Requests one by one: the rates, the same prompts at other times, and who was best at what."""

from __future__ import annotations

import pytest
from pipeline_models import model_of

from splitwiser_lab import HardwareError, Workload, WorkloadError
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.pipelines.arrivals import Rate, arriving
from splitwiser_lab.pipelines.experiment import EXPERIMENTS
from splitwiser_lab.pipelines.rows import Row
from splitwiser_lab.pipelines.turns import Turns
from splitwiser_lab.pipelines.winners import best_row, winners


def test_rates_are_requests_a_second_or_a_share_of_what_is_served() -> None:
    assert Rate.parse(" 12.5").requests_per_s(100.0) == 12.5
    assert Rate.parse("70%").requests_per_s(20.0) == 14.0
    assert Rate.parse("70%").requests_per_s(215.7654) == 151.0, "a number that can be given by hand"
    for wrong in ("", "fast", "0", "-3", "inf", "70%%", "70% of it"):
        with pytest.raises(WorkloadError, match="give requests a second"):
            Rate.parse(wrong)


def test_requests_stay_the_same_when_they_come_one_by_one() -> None:
    closed = Workload.closed(20, 6, 4, seed=3)
    later = arriving(closed, 10.0)
    assert [item.prompt for item in later.requests(500)] == [item.prompt for item in closed.requests(500)]
    assert later.describe()["requests_per_s"] == pytest.approx(10.0) and later.arrivals[0].arrival_s == 0
    assert len({item.arrival_s for item in later.arrivals}) == 20 and later.ignore_eos


def test_each_rate_has_rows_of_its_own_after_all_at_once() -> None:
    experiment = EXPERIMENTS["small"].with_knobs(input=5, requests=3)
    seen: list[tuple[str, float]] = []

    def runner(name: str, served: float):
        def run(workload: Workload) -> tuple[dict[str, float], list[list[int]]]:
            seen.append((name, workload.arrivals[-1].arrival_s))
            return {"output_throughput": served, "request_throughput": served}, [[1]] * len(workload)

        return run

    runners = {"generate": runner("generate", 1.0), "sequential": runner("sequential", 4.0), "b": runner("b", 2.0)}
    rates = (Rate(8.0), Rate(0.5, of_served=True))
    turns = Turns(runners, experiment, Reference(model_of("llama")), {}, lambda _: None, rates)
    turns.run((1,), repeats=2)
    rows = turns.rows
    assert [(row.name, row.rate) for row in rows] == [
        *[("generate", None), ("sequential", None), ("b", None)],
        *[("sequential", 8.0), ("b", 8.0), ("sequential", 2.0), ("b", 2.0)],
    ]
    assert all(row.repeats == 2 for row in rows)
    assert rows[-1].samples["over_sequential"] == [0.5, 0.5]
    last = {round(at, 6) for name, at in seen if name == "generate"}
    assert last == {0.0}, "generate takes batches"
    assert {round(at, 6) for name, at in seen if name == "b"} == {0.0, 0.25, 1.0}, "two gaps of 1/8 s, or of 1/2 s"


def test_what_starts_together_is_launched_before_anything_runs() -> None:
    experiment = EXPERIMENTS["small"].with_knobs(input=5, requests=2)
    told: list[str] = []

    class Way:
        def __init__(self, name: str, room: bool = True) -> None:
            self.name, self.room = name, room

        def launch(self, workload: Workload) -> None:
            told.append(f"launch {self.name}, {len(workload)} requests")
            self.check()

        def check(self) -> None:
            if not self.room:
                raise HardwareError("8 × 1 GiB, and 2 GiB are free")

        def __call__(self, workload: Workload) -> tuple[dict[str, float], list[list[int]]]:
            self.check()
            told.append(f"run {self.name}")
            return {"output_throughput": 1.0}, [[1]] * len(workload)

    runners = {"generate": Way("generate").__call__, "sequential": Way("sequential"), "many": Way("many", room=False)}
    skipped: dict[str, str] = {}
    turns = Turns(
        runners, experiment, Reference(model_of("llama")), skipped, lambda _: None, start_together=True
    )  # fmt: skip
    turns.run((1,), repeats=1)
    assert [row.name for row in turns.rows] == ["generate", "sequential"]
    launched = ["launch sequential, 2 requests", "launch many, 2 requests", "launch sequential, 2 requests"]
    assert told[1:5] == [*launched, "run sequential"], "the second time it starts what waited for others"
    assert skipped == {"many, 1 new tokens": "8 × 1 GiB, and 2 GiB are free"}


def made(name: str, mode: str, rate: float | None = None, **figures: float) -> Row:
    row = Row(name, 128, mode, rate=rate)
    row.add(figures)
    return row


def test_the_best_at_each_figure_is_named_with_its_multiple() -> None:
    rows = [
        made("sequential", "sequential", output_throughput=10000.0, over_sequential=1.0),
        made("replicas × 2, MPS", "replicas", output_throughput=12500.0, over_sequential=1.2),
        made("replicas × 4, MPS", "replicas", output_throughput=12600.0, over_sequential=1.1),
        made("engine: streams", "engine", output_throughput=90000.0, over_sequential=9.0),
        made("sequential", "sequential", 5.0, median_ttft_ms=20.0, p99_ttft_ms=50.0, p99_itl_ms=40.0),
        made("split × 2, shared", "split", 5.0, median_ttft_ms=30.0, p99_ttft_ms=45.0, p99_itl_ms=10.0),
    ]
    assert winners(rows) == [
        "128 new tokens, all at once: largest multiple of sequential in the same rounds replicas × 2, MPS (1.20); "
        "most output tok/s replicas × 4, MPS (12,600.0).",
        "128 new tokens, 5 arrivals/s: shortest TTFT p50 sequential (20.0); shortest TTFT p99 split × 2, shared "
        "(45.0, 0.90 × sequential's); shortest ITL p99 split × 2, shared (10.0, 0.25 × sequential's).",
    ]
    assert best_row(rows[1:2], "output_throughput") is None, "nothing to compare with"
    assert winners([]) == []
