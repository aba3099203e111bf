"""The paper's experiment run again: its knobs, and the command on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from random import random

import pytest
from pipeline_models import model_of
from tiny_models import build
from typer.testing import CliRunner

from splitwiser_lab import HardwareError, ModeError, Workload, WorkloadError
from splitwiser_lab.cli import app
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.pipelines import budget
from splitwiser_lab.pipelines.document import Reproduction
from splitwiser_lab.pipelines.experiment import EXPERIMENTS
from splitwiser_lab.pipelines.join import join
from splitwiser_lab.pipelines.turns import Turns

pytestmark = pytest.mark.timeout(180)
run = CliRunner().invoke


def names(**knobs: object) -> list[str]:
    return [str(placement) for placement in EXPERIMENTS["paper"].with_knobs(**knobs).placements]


def test_the_papers_scale() -> None:
    paper = EXPERIMENTS["paper"]
    assert (paper.model, paper.batch, paper.input, paper.outputs) == ("opt-125m-shape", 20, 1024, (12, 128))
    assert paper.requests % (8 * paper.batch) == 0, "each of 8 replicas has whole batches"
    assert names() == [str(placement) for placement in paper.placements]
    assert {"replicas × 8, MPS", "split × 2, MPS", "replicas × 4"} <= set(names())
    a, b = (paper.workload(output).requests(vocab_size=1000) for output in paper.outputs)
    assert [item.prompt for item in a] == [item.prompt for item in b]


def test_knobs_choose_placements() -> None:
    assert names(modes=["split"], mps=False) == ["sequential", "split × 2", "split × 4", "split × 8"]
    assert names(modes=["sequential"]) == ["sequential"]
    assert names(processes=[3], mps=True) == ["sequential", "replicas × 3, MPS", "split × 3, MPS"]
    assert names(modes=["split"], processes=[2], sm_shares=[75, 25]) == ["sequential", "split × 2, MPS 75/25 %"]
    changed = EXPERIMENTS["small"].with_knobs(model="x", batch=3, outputs=(5, 6), seed=None)
    assert (changed.model, changed.batch, changed.outputs, changed.seed) == ("x", 3, (5, 6), 0)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"batch": 0}, WorkloadError, "batch=0"),
        ({"outputs": (4, 0)}, WorkloadError, "output=0"),
        ({"modes": ["threads"]}, ModeError, "no mode 'threads'"),
        ({"modes": ["split"], "processes": [1]}, ModeError, "split needs 2"),
        ({"sm_shares": [75, 25], "mps": False, "processes": [2]}, ModeError, "add mps=True"),
    ],
)
def test_knobs_that_make_no_sense(knobs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EXPERIMENTS["paper"].with_knobs(**knobs)


def test_the_command_prints_and_writes(tmp_path: Path, no_process_left: None) -> None:
    build("llama").save_pretrained(tmp_path / "tiny")
    words = ["reproduce", "--model", str(tmp_path / "tiny"), "--device", "cpu", "--mode", "split", "--processes", "2"]
    words += ["--batch", "2", "--input", "20", "--output", "4,6", "--requests", "5", "--repeats", "2"]
    words += ["--phase-seconds", "0.3"]
    result = run(app, [*words, "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())
    ways = ["generate", "sequential", "split × 2", "engine: sequential", "engine: processes"]
    assert [row["name"] for row in found["rows"]] == ways * 2
    assert [row["output_tokens"] for row in found["rows"]] == [4] * 5 + [6] * 5
    assert all(row["tokens_identical"] and row["repeats"] == 2 for row in found["rows"])
    assert all(row["over_sequential"] > 0 for row in found["rows"])
    split = found["rows"][2]
    assert split["hand_off_write_ms"] > 0 and split["hand_off_bytes"] > 0 and split["spawn_s"] > 0
    assert found["hardware"]["cores"] and found["versions"]["transformers"] and found["commit"]
    assert split["mode"] == "split" and split["private_gb"] > 0
    assert "split × 2" in result.stdout and "identical" in result.stdout and "so that it can gain" in result.stdout
    prefill, decode = found["phases"]
    assert prefill["tokens_per_s"] == pytest.approx(2 * 20 / prefill["seconds"])
    assert decode["tokens"] == 23 and len(decode["samples_s"]) % 5 == 0, "whole runs of 6 tokens: 5 steps each"
    layers, heads, dim = 2, 2, 8
    assert [phase["kv_bytes"] for phase in found["phases"]] == [2 * layers * 2 * heads * n * dim * 4 for n in (20, 25)]
    assert "only a GPU" in prefill["missing"]["SMs at work"]
    assert prefill["memory_gb"] > 0
    assert json.loads(Reproduction.load(tmp_path / "r.json").to_json()) == found


def tiny_words(folder: Path) -> list[str]:
    """A run over a tiny model, which lasts until it is ended; its figures go to r.json in this folder."""
    build("llama").save_pretrained(folder / "tiny")
    words = ["reproduce", "--model", str(folder / "tiny"), "--device", "cpu", "--mode", "split", "--processes", "2"]
    words += ["--batch", "2", "--input", "20", "--output", "4,6", "--requests", "5", "--phase-seconds", "0"]
    return [*words, "--no-engine", "--repeats", "9999", "--json", str(folder / "r.json")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "why"),
    [
        (signal.SIGINT, 130, "interrupted before it was measured"),
        (signal.SIGTERM, -signal.SIGTERM, "not measured yet when this was written"),
        (signal.SIGKILL, -signal.SIGKILL, "not measured yet when this was written"),
    ],
)
def test_a_run_that_is_ended_leaves_what_it_measured(tmp_path: Path, end: int, code: int, why: str) -> None:
    words = [sys.executable, "-m", "splitwiser_lab", *tiny_words(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        try:
            while running.poll() is None and not (len(rows_so_far(tmp_path)) == 6 and random() < 0.1):
                time.sleep(0.05)
            running.send_signal(end)
            told, _ = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == code
    found = Reproduction.load(tmp_path / "r.json")
    ways = ["generate", "sequential", "split × 2"]
    assert [(row.name, row.output) for row in found.rows] == [(name, n) for n in (4, 6) for name in ways]
    assert all(row.tokens_identical and row.repeats >= 1 for row in found.rows) and found.phases
    assert {(left.what, left.why, left.rounds) for left in found.left_out} == {(r.what, why, 9999) for r in found.rows}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")] or end == signal.SIGKILL
    if end == signal.SIGINT:
        assert "split × 2" in told and why in told and "of 9999 rounds" in told
    joined = join([found, found], ["a", "b"])
    assert [row.repeats for row in joined.rows] == [2 * row.repeats for row in found.rows]
    assert joined.left_out == found.left_out


def rows_so_far(folder: Path) -> list[object]:
    path = folder / "r.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def test_a_time_ends_the_command_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_process_left: None
) -> None:
    looks = count()  # a clock on which each look takes a second
    monkeypatch.setattr(budget, "Budget", partial(budget.Budget, clock=lambda: float(next(looks))))
    words = [*tiny_words(tmp_path), "--seconds"]
    result = run(app, [*words, "200"])
    assert result.exit_code == 0, result.output
    found = Reproduction.load(tmp_path / "r.json")
    assert len(found.rows) == 6 and {left.what for left in found.left_out} == {row.what for row in found.rows}
    assert all("no time" in left.why and "of 200 s are left" in left.why for left in found.left_out)
    assert "of 9999 rounds: " in result.stdout and ": no time" in result.stdout
    result = run(app, [*words, "0.001"])
    assert result.exit_code != 0 and "left no time to measure anything" in str(result.exception)
    nothing = Reproduction.load(tmp_path / "r.json")
    assert not nothing.rows and len(nothing.left_out) == 6, "a document all the same"


def test_only_the_phases(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "tiny")
    words = ["reproduce", "--model", str(tmp_path / "tiny"), "--device", "cpu", "--only-phases", "--phase-seconds", "0"]
    words += ["--batch", "2", "--input", "20", "--output", "4"]
    result = run(app, [*words, "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert not found["rows"] and [len(phase["samples_s"]) for phase in found["phases"]] == [1, 3], "one pass of each"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pipeline", "jax"], "no pipeline 'jax'"),
        (["--scale", "large"], "small or paper"),
        (["--seconds", "-3"], "give a time in seconds"),
        (["--only-phases", "--seconds", "3"], "give it no --seconds"),
        (["--processes", "two"], "give whole numbers"),
        (["--pipeline", "vllm", "--only-phases"], "is for --pipeline hf"),
        (["--pipeline", "vllm", "--rate", "fast"], "give requests a second"),
        (["--pipeline", "vllm", "--max-batch", "0"], "max_batch=0"),
        (["--rate", "5"], "each starts when it is full"),
        (["--eager"], "are for --pipeline vllm"),
    ],
)
def test_words_that_cannot_be(words: list[str], message: str) -> None:
    result = run(app, ["reproduce", *words])
    assert result.exit_code != 0 and message in str(result.exception)


def test_what_has_no_room_is_left_out_with_its_reason() -> None:
    experiment = EXPERIMENTS["small"].with_knobs(input=5, requests=2)
    rates = iter(range(1, 100))

    def works(workload: Workload) -> tuple[dict[str, float], list[list[int]]]:
        return {"output_throughput": float(next(rates))}, [[1]] * len(workload)

    def has_no_room(workload: Workload) -> tuple[dict[str, float], list[list[int]]]:
        raise HardwareError("8 × 1 GiB, and 2 GiB are free")

    runners = {"generate": works, "sequential": works, "replicas × 8": has_no_room}
    skipped: dict[str, str] = {}
    turns = Turns(runners, experiment, Reference(model_of("llama")), skipped, lambda _: None)
    turns.run((1,), repeats=2)
    rows = turns.rows
    assert [row.mode for row in rows] == ["generate", "sequential"]
    assert not turns.left_out and [row.name for row in rows] == ["generate", "sequential"]
    assert rows[1].samples["over_sequential"] == [1.0, 1.0]
    assert skipped == {"replicas × 8, 1 new tokens": "8 × 1 GiB, and 2 GiB are free"}
    runners["sequential"] = has_no_room
    with pytest.raises(HardwareError):  # without it there is nothing to compare with
        Turns(runners, experiment, Reference(model_of("llama")), {}, lambda _: None).run((1,), repeats=2)
