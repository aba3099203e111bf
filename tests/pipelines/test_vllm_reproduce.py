"""The vLLM experiment run again: its knobs, and that it finds out an engine that writes other tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vllm_models import fake_python, tiny_for_vllm

from splitwiser_lab import ModeError, WorkloadError
from splitwiser_lab.cli import app
from splitwiser_lab.pipelines.document import Reproduction
from splitwiser_lab.pipelines.join import join
from splitwiser_lab.pipelines.vllm.experiment import VLLM_EXPERIMENTS

pytestmark = pytest.mark.timeout(120)


def names(scale: str = "paper", **knobs: object) -> list[str]:
    return [str(placement) for placement in VLLM_EXPERIMENTS[scale].with_knobs(**knobs).placements]  # type: ignore[index]


def test_the_papers_scale() -> None:
    paper = VLLM_EXPERIMENTS["paper"]
    assert (paper.model, paper.input, paper.outputs, paper.requests) == ("opt-125m-shape", 1024, (128,), 128)
    assert names() == [str(placement) for placement in paper.placements]
    assert names()[:2] == ["sequential", "sequential, chunks of 512"]
    assert {"replicas × 4", "replicas × 4, MPS", "split × 2, shared, MPS 90/25 %", "split × 2, example"} <= set(names())


def test_knobs_choose_placements() -> None:
    assert names("small", modes=["replicas"], processes=[2, 4]) == ["sequential", "replicas × 2", "replicas × 4"]
    assert names("small", modes=["split"], mps=True) == [
        "sequential",
        "split × 2, shared, MPS",
        "split × 2, example, MPS",
    ]
    assert names(modes=["split"], mps=True) == [
        "sequential",
        "split × 2, shared, MPS",
        "split × 2, shared, MPS 90/25 %",
    ], "the experiment's own, where it has some under MPS"
    assert names(modes=["split"], mps=False) == ["sequential", "split × 2, shared", "split × 2, example"]
    assert names("small", modes=["split"], sm_shares=[60, 40])[1] == "split × 2, shared, MPS 60/40 %"
    changed = VLLM_EXPERIMENTS["small"].with_knobs(model="x", requests=3, outputs=(5, 6), seed=None)
    assert (changed.model, changed.requests, changed.outputs, changed.seed) == ("x", 3, (5, 6), 0)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"requests": 0}, WorkloadError, "requests=0"),
        ({"modes": ["threads"]}, ModeError, "no mode 'threads'"),
        ({"modes": ["split"], "processes": [1]}, ModeError, "split needs 2"),
        ({"modes": ["split"], "sm_shares": [75, 25], "mps": False}, ModeError, "add mps=True"),
    ],
)
def test_knobs_that_make_no_sense(knobs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        names("small", **knobs)


def test_an_engine_that_writes_other_tokens_is_found_out(tmp_path: Path, no_process_left: None) -> None:
    tiny_for_vllm(tmp_path / "tiny")
    words = ["reproduce", "--pipeline", "vllm", "--model", str(tmp_path / "tiny"), "--device", "cpu", "--mode", "split"]
    words += ["--vllm", fake_python(tmp_path), "--input", "20", "--output", "4", "--requests", "5", "--repeats", "2"]
    result = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "r.json")])
    assert "tokens differ from the reference's in sequential, split × 2, shared" in str(result.exception)
    found = json.loads((tmp_path / "r.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    ways = ["generate", "sequential", "split × 2, shared", "split × 2, example"]
    assert list(rows) == [*ways, "engine: sequential", "engine: processes"]
    assert [rows[name]["tokens_identical"] for name in rows] == [True, False, False, False, True, True]
    assert all(row["repeats"] == 2 and row["over_sequential"] > 0 for row in found["rows"])
    assert rows["split × 2, shared"]["hand_off_load_ms"] > 0 and rows["sequential"]["spawn_s"] > 0
    assert found["pipeline"] == "vllm" and found["versions"]["vllm"] == "0.32.0"


def test_an_older_regime_and_requests_one_by_one(tmp_path: Path, no_process_left: None) -> None:
    tiny_for_vllm(tmp_path / "tiny")
    words = ["reproduce", "--pipeline", "vllm", "--model", str(tmp_path / "tiny"), "--device", "cpu", "--mode", "split"]
    words += ["--vllm", fake_python(tmp_path), "--input", "20", "--output", "4", "--requests", "4", "--repeats", "1"]
    words += ["--eager", "--max-batch", "2", "--rate", "40,50%", "--no-engine", "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, words)
    assert "tokens differ" in str(result.exception), "the fake's"
    found = Reproduction.load(tmp_path / "r.json")
    assert found.work.eager and found.work.max_batch == 2
    assert "eager, 2 at once per engine" in str(found.work)
    closed, forty, half = (
        [row for row in found.rows if row.rate == rate] for rate in dict.fromkeys(row.rate for row in found.rows)
    )
    ways = ["sequential", "split × 2, shared", "split × 2, example"]
    assert [row.name for row in closed] == ["generate", *ways]
    assert [row.name for row in forty] == [row.name for row in half] == ways and forty[0].rate == 40.0
    assert half[0].rate == pytest.approx(0.5 * (closed[1].figure("request_throughput") or 0), rel=0.01)
    for row in (*forty, *half):
        assert all(row.figure(name) is not None for name in ("median_ttft_ms", "p99_ttft_ms", "p99_itl_ms"))
    table = found.table_rows()
    assert table[0]["arrivals/s"] == "all at once" and table[4]["arrivals/s"] == "40" and table[4]["ITL p99 ms"]
    assert sum("shortest ITL p99" in note for note in found.notes()) == 2
    again = join([found, found], ["a", "b"])
    assert [(row.name, row.rate) for row in again.rows] == [(row.name, row.rate) for row in found.rows]
    assert all(row.repeats == 2 for row in again.rows)


def test_no_vllm_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_for_vllm(tmp_path)
    monkeypatch.setattr("splitwiser_lab.pipelines.vllm.process.find_vllm", lambda given: given)
    result = CliRunner().invoke(app, ["reproduce", "--pipeline", "vllm", "--model", str(tmp_path), "--device", "cpu"])
    assert result.exit_code != 0 and "make vllm" in str(result.exception)
