"""Reported figures beside recorded ones: what is chosen, what is called missing, what is called less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitwiser_lab.lab import rerun
from splitwiser_lab.lab.rerun import (
    MISSING,
    beside_reported,
    best,
    gains,
    one_by_one,
    recorded_reproductions,
    summary,
    throughputs,
)
from splitwiser_lab.pipelines.document import Reproduction
from splitwiser_lab.pipelines.reported import CLAIMS, as_gain
from splitwiser_lab.pipelines.rows import LeftOut, Row, Work

ORIGIN = {
    "hardware": {"device_name": "some CPU", "cores": 2},
    "versions": {},
    "command": "splitwiser-lab reproduce",
    "commit": "abc",
    "time_utc": "2026-01-01T00:00:00+00:00",
}


def row(name: str, mode: str, processes: int, ratio: float, steady: float | None = None, output: int = 12) -> Row:
    made = Row(name, output, mode, processes)
    made.add({"output_throughput": 10 * ratio, "over_sequential": ratio, "steady_output_throughput": steady})
    return made


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[rerun.Recorded]:
    """A Hugging Face recording of a CPU, and nothing else."""
    rows = (
        row("sequential", "sequential", 1, 1.0, 10.0),
        row("replicas × 2", "replicas", 2, 1.5, 16.0),
        row("split × 2", "split", 2, 0.9, 12.0),
        row("replicas × 4", "replicas", 4, 1.3, 14.0),
        row("engine: sequential", "engine", 1, 3.0),
    )
    work = Work("tiny", False, "float32", 2, 64, 8, 0)
    left = (LeftOut("split × 4, 12 new tokens", "no time", 2),)
    made = Reproduction("hf", work, rows, {"replicas × 8": "no memory"}, ORIGIN, left_out=left)
    made.to_json(tmp_path / "recordings" / "cpu" / "reproduce-hf.json")
    monkeypatch.setattr(rerun.shipped, "PLACES", (tmp_path,))
    return recorded_reproductions()


def test_every_machine_and_pipeline_has_a_column_recorded_or_not(recordings: list[rerun.Recorded]) -> None:
    assert [(r.label, r.document is None) for r in recordings] == [
        ("CPU, Hugging Face", False),
        ("CPU, vLLM", True),
        ("H200, Hugging Face", True),
        ("H200, vLLM", True),
    ]
    assert "some CPU, 2 CPU cores; 2026-01-01, commit abc" in str(recordings[0])
    assert "left out: replicas × 8: no memory\n  left out: split × 4, 12 new tokens: no time" in str(recordings[0])
    assert str(recordings[1]) == f"CPU, vLLM: {MISSING}"


def test_several_recordings_of_a_pipeline_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models, an older regime, and requests one by one, as they will come from a GPU."""
    late = Row("split × 2, shared", 12, "split", 2, rate=5.0)
    late.add({"output_throughput": 60.0, "over_sequential": 1.0, "p99_itl_ms": 4.0, "median_ttft_ms": 30.0})
    base = Row("sequential", 12, "sequential", rate=5.0)
    base.add({"output_throughput": 60.0, "over_sequential": 1.0, "p99_itl_ms": 16.0, "median_ttft_ms": 20.0})
    rows = (row("sequential", "sequential", 1, 1.0), row("split × 2, shared", "split", 2, 0.5), base, late)
    for number, (model, eager) in enumerate([("opt", False), ("opt", True), ("llama", False)]):
        work = Work(model, True, "bfloat16", 8, 64, 8, 0, eager)
        made = Reproduction("vllm", work, rows, {}, ORIGIN)
        made.to_json(tmp_path / "recordings" / "h200" / f"reproduce-vllm-{number}.json")
    monkeypatch.setattr(rerun.shipped, "PLACES", (tmp_path,))
    found = [recorded for recorded in recorded_reproductions() if recorded.document]
    labels = ["H200, vLLM, opt, default", "H200, vLLM, opt, eager", "H200, vLLM, llama, default"]
    assert [recorded.label for recorded in found] == labels
    assert list(measured(found).values())[1] == dict.fromkeys(labels, "best: split × 2, shared: 0.50, a loss")
    assert [line["recorded"] for line in summary(found)] == labels
    document = found[0].document
    assert document is not None and gains(document, 12) == {"sequential": 1.0, "split × 2, shared": 0.5}
    latencies = one_by_one(found)
    assert [line["recorded"] for line in latencies] == labels and latencies[0]["arrivals/s"] == "5"
    assert latencies[0]["TTFT p50"] == "sequential (20 ms, 1.00 ×)" and latencies[0]["TTFT p99"] == "n/a"
    assert latencies[0]["ITL p99"] == "split × 2, shared (4 ms, 0.25 ×)"
    only_base = Reproduction("vllm", document.work, (base,), {}, ORIGIN)
    (alone,) = one_by_one([rerun.Recorded("here", "H200", "vllm", only_base)])
    assert alone["TTFT p50"] == "replicas and split were not measured so" and "ITL p99" not in alone
    assert one_by_one([])[0]["arrivals/s"] == MISSING


def measured(found: list[rerun.Recorded]) -> dict[str, dict[str, str]]:
    """By what is claimed: what was measured in which recording."""
    told: dict[str, dict[str, str]] = {}
    for line in beside_reported(found):
        if line["reported"]:
            own = told.setdefault(line["reported"].partition(" (")[0], {})
            assert line["source"] and line["not told"] and not line["measured here"]
        else:
            own[line["recorded"]] = line["measured here"]
    assert list(told) == [claim.said for claim in CLAIMS]
    return told


def test_claims_stand_above_the_rows_they_mean(recordings: list[rerun.Recorded]) -> None:
    latency, best_latency, throughput, steady = measured(recordings).values()
    assert latency == {
        "CPU, Hugging Face": "replicas × 2: 1.50, as much or more; split × 2: 0.90, a loss",
        "H200, Hugging Face": MISSING,
    }, "and nothing of vLLM, about which the figure is not"
    best = "best: replicas × 2: 1.50, as much or more"
    assert best_latency["CPU, Hugging Face"] == throughput["CPU, Hugging Face"] == best
    assert steady["CPU, Hugging Face"] == "replicas × 4: 1.40, as much or more", "in the window in which all had work"
    assert best_latency["CPU, vLLM"] == MISSING


def test_less_than_reported_is_called_less() -> None:
    document = Reproduction(
        "hf",
        Work("tiny", False, "float32", 2, 64, 8, 0),
        (row("sequential", "sequential", 1, 1.0), row("split × 2", "split", 2, 1.1, output=128)),
        {},
        ORIGIN,
    )
    found = list(measured([rerun.Recorded("here", "CPU", "hf", document)]).values())
    assert found[0]["here"] == "split × 2, 128 new tokens: 1.10, less"
    assert found[3]["here"] == "not run with 4 processes"


def test_bars_and_bests(recordings: list[rerun.Recorded]) -> None:
    document = recordings[0].document
    assert document is not None
    assert throughputs(document, 12)["replicas × 2"] == 15.0 and gains(document, 12)["engine: sequential"] == 3.0
    found = best(document, "replicas", "split")
    assert found is not None and found[0].name == "replicas × 2" and best(document, "mps") is None
    assert summary(recordings)[0]["this package's engine"] == "3.00 × (engine: sequential, 12 new tokens)"
    assert summary(recordings)[1]["best of the paper's"] == MISSING


def test_latency_saved_is_a_gain() -> None:
    assert as_gain(0.5) == 2.0
    assert CLAIMS[0].gain == pytest.approx(1 / 0.824)


@pytest.mark.parametrize("shape", ["llama-3.2-1b-shape", "llama-3.1-8b-shape"])
def test_the_recorded_overlap_of_a_gpu(shape: str) -> None:
    told, modes = rerun.hardware_shared(shape)
    assert "NVIDIA H200" in told and {"streams", "mps", "chunked"} <= set(modes)
    assert all(0.5 < value < 2 for value in modes.values())


def test_what_was_withdrawn_is_shown_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason; the recording stays as it was made."""
    shapes = ("streams", "mps", "mps:decode_share=50")
    rows = [{"mode": mode, "load": "some load", "gain": {"median": 1.2}} for mode in shapes]
    made = {"sections": {"overlap": {"a-shape": {"rows": rows}}}, **ORIGIN}
    folder = tmp_path / "recordings" / "h200"
    folder.mkdir(parents=True)
    (folder / "bench_gpu.json").write_text(json.dumps(made))
    monkeypatch.setattr(rerun.shipped, "PLACES", (tmp_path,))
    assert list(rerun.hardware_shared("a-shape")[1]) == ["streams", "mps", "mps (decode_share=50)"]
    (folder / "withdrawn.json").write_text(json.dumps({"bench_gpu.json": {"mps": "it was wrong"}, "other.json": {}}))
    told, modes = rerun.hardware_shared("a-shape")
    assert list(modes) == ["streams"] and told.endswith("; without mps: it was wrong")
