"""vLLM as it comes, as a row of a reproduction: a fake engine, since what is tested is how it starts, runs and ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_models import model_of
from vllm_models import fake_python, tiny_for_vllm

from splitwiser_lab import LaneError, VllmPipeline, Workload
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.pipelines import turns
from splitwiser_lab.pipelines.arrivals import Rate
from splitwiser_lab.pipelines.runners import prompts_of
from splitwiser_lab.pipelines.vllm import pipeline as pipelines
from splitwiser_lab.pipelines.vllm.experiment import VLLM_EXPERIMENTS
from splitwiser_lab.pipelines.vllm.shipped import SHIPPED, ShippedRunner

WORK = Workload.closed(3, 12, 4)


class Peer:
    """Counts up from the length of the prompt."""

    closed = 0

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        if self.fault:
            raise RuntimeError(self.fault)
        return 0.5, [[len(prompt) + n for n in range(new_tokens)] for prompt in prompts]

    def close(self) -> None:
        Peer.closed += 1


def test_it_starts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "closed", 0)
    started: list[Peer] = []

    def start() -> Peer:
        started.append(Peer())
        return started[-1]

    runner = ShippedRunner(start, model_of("llama"))  # type: ignore[arg-type]
    runner.launch(WORK)
    runner.launch(WORK)
    figures, tokens = runner(WORK)
    assert tokens == [[12, 13, 14, 15]] * 3 and figures == {"duration": 0.5, "output_throughput": 24.0}
    runner(WORK)
    assert len(started) == 1
    runner.close()
    runner.close()
    assert Peer.closed == 1


def test_its_failure_is_a_lanes_and_the_next_run_starts_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "closed", 0)
    peers = iter([Peer("it is out of memory"), Peer()])
    runner = ShippedRunner(lambda: next(peers), model_of("llama"))  # type: ignore[arg-type, return-value]
    with pytest.raises(LaneError, match="vLLM as shipped: it is out of memory"):
        runner(WORK)
    assert Peer.closed == 1 and len(runner(WORK)[1]) == 3

    def start() -> Peer:
        raise RuntimeError("vLLM ended: no such GPU")

    broken = ShippedRunner(start, model_of("llama"))  # type: ignore[arg-type]
    with pytest.raises(LaneError, match="no such GPU"):
        broken(WORK)
    broken.close()


def test_it_takes_requests_all_at_once_only() -> None:
    experiment = VLLM_EXPERIMENTS["small"].with_knobs(input=12, requests=3, outputs=(2,))
    model = model_of("llama")
    theirs = [Reference(model).tokens(prompt, 2, True) for prompt in prompts_of(experiment.workload(2), model)]

    def way(workload: Workload) -> tuple[dict[str, float], list[list[int]]]:
        return {"output_throughput": 1.0, "request_throughput": 1.0}, theirs[: len(workload)]

    class Right(Peer):
        def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
            return 0.5, theirs[: len(prompts)]

    runners = {"generate": way, "sequential": way, SHIPPED: ShippedRunner(Right, model)}  # type: ignore[dict-item]
    taken = turns.Turns(runners, experiment, Reference(model), {}, lambda _: None, rates=(Rate(1000.0),))  # type: ignore[arg-type]
    taken.run((2,), repeats=1)
    assert [(row.name, row.rate is None) for row in taken.rows] == [
        ("generate", True),
        ("sequential", True),
        (SHIPPED, True),
        ("sequential", False),
    ]
    assert not taken.left_out and not any(row.different for row in taken.rows)


def test_the_pipeline_offers_one_with_room_for_all_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_for_vllm(tmp_path / "tiny")
    asked: list[tuple] = []
    monkeypatch.setattr(pipelines, "VllmPeer", lambda *given, wait: asked.append((*given, wait)))
    python = fake_python(tmp_path)
    with VllmPipeline.from_pretrained(tmp_path / "tiny", "cpu", vllm_python=python) as made:
        made.shipped(Workload.closed(5, 100, 20))
    token = 2 * 2 * 2 * 32 * 4  # layers, key and value, heads, dim, float32
    assert asked == [(python, "float32", "cpu", 128, tmp_path / "tiny", (5 * 128 + 256) * token, False)]
