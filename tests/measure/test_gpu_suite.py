"""The suite for GPUs, small and on a CPU: every section runs, failures cost a section, time ends it, verdicts judge."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_models import build
from typer.testing import CliRunner

import splitwiser_lab as sl
from splitwiser_lab.cli import app
from splitwiser_lab.measure.gpu_suite import overlap_map as overlap_module
from splitwiser_lab.measure.gpu_suite import suite as suite_module
from splitwiser_lab.measure.gpu_suite.plan import SECTIONS, SMALL
from splitwiser_lab.measure.gpu_suite.suite import Suite
from splitwiser_lab.measure.gpu_suite.tables import tables
from splitwiser_lab.measure.overlap import Shape
from splitwiser_lab.measure.recording import recordings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("suite") / "tiny-llama"
    build("llama", max_position_embeddings=4096).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def tiny_everywhere(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_module, "HOST_BOUND_SHAPE", model)
    monkeypatch.setattr("splitwiser_lab.measure.peers.find_vllm", lambda python: None)


PLAN = replace(SMALL, overlap_seconds=0.1, sweep_seconds=0.2)


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_module, "HOST_BOUND_SHAPE", model)
        patch.setattr("splitwiser_lab.measure.peers.find_vllm", lambda python: None)
        ceilings = suite_module.Ceilings("tiny", "float32", 1e12, 1e11, "made up")
        patch.setattr(suite_module, "measure_ceilings", lambda device, dtype: ceilings)
        return Suite(
            [model], plan=PLAN, device="cpu", repeats=2, seconds=120, path=folder / "s.json", record=folder / "r"
        ).run()


class TestWhole:
    def test_every_section_has_rows_and_is_written(self, whole: Suite) -> None:
        found = json.loads(whole.path.read_text())
        assert found["schema"] == "splitwiser-lab/gpu-suite/1" and list(found["sections"]) == list(SECTIONS)
        for section, shapes in found["sections"].items():
            assert shapes["tiny-llama"]["rows"], f"{section}: {shapes}"
        assert {"hardware", "versions", "command", "commit", "ceilings", "limits", "verdicts"} <= set(found)

    def test_what_this_machine_lacks_is_left_out_with_its_reason(self, whole: Suite) -> None:
        left_out = whole.to_dict()["sections"]["overlap"]["tiny-llama"]["left_out"]
        reasons = {item["what"]: item["why"] for item in left_out}
        assert {"streams", "partitioned", "mps"} <= set(reasons) and all(reasons.values())

    def test_phases_are_judged_by_their_ceilings(self, whole: Suite) -> None:
        rows = whole.to_dict()["sections"]["efficiency"]["tiny-llama"]["rows"]
        assert {(row["phase"], row["lengths"]) for row in rows} == {
            ("prefill", "equal"),
            ("decode", "equal"),
            ("decode", "ragged"),
        }
        for row in rows:
            assert 0 < row["share"]["low"] <= row["share"]["median"] <= row["share"]["high"] < 1
            assert row["rate"]["median"] == pytest.approx(row["share"]["median"] * row["ceiling"])

    def test_each_phase_is_divided_by_kind_and_judged_by_its_ceilings(self, whole: Suite) -> None:
        sections = whole.to_dict()["sections"]
        keys = ("phase", "batch", "tokens", "lengths")
        rows = sections["kernels"]["tiny-llama"]["rows"]
        assert [[r[k] for k in keys] for r in rows] == [
            [r[k] for k in keys] for r in sections["efficiency"]["tiny-llama"]["rows"]
        ]
        for row in rows:
            parts = sum(row[f"{kind}_ms"]["median"] for kind in ("products", "attention", "rest"))
            assert parts == pytest.approx(row["ms"]["median"]) and row["idle_ms"] is None, "a CPU's idle is not known"
            assert 0 < row["products_share"]["median"] < 1 and row["longest_ms"]
            assert row["products_rate"]["median"] == pytest.approx(row["products_share"]["median"] * row["ceiling"])

    def test_the_gain_has_a_limit_where_lanes_divide_the_machine(self, whole: Suite) -> None:
        rows = {row["mode"]: row for row in whole.to_dict()["sections"]["overlap"]["tiny-llama"]["rows"]}
        assert rows["chunked"]["limit"] is None
        assert rows["processes"]["limit"]["median"] > 0 and len(rows["processes"]["gain"]["samples"]) == 2

    def test_each_mode_has_each_rate_with_all_rounds(self, whole: Suite) -> None:
        rows = [r for r in whole.to_dict()["sections"]["sweep"]["tiny-llama"]["rows"] if r["part"] == "rate"]
        cases = [(row["fraction"], row["mode"]) for row in rows]
        assert len(set(cases)) == len(cases) and {fraction for fraction, _ in cases} == set(PLAN.sweep_fractions)
        assert {"sequential", "chunked", "processes"} <= {mode for _, mode in cases}
        assert all(row["tokens_as_sequential"] == 1.0 for row in rows), "float32: the same tokens in every mode"
        assert all(len(row["goodput"]["samples"]) == 2 for row in rows)

    def test_differences_of_tokens_are_counted_for_each_mode(self, whole: Suite) -> None:
        rows = [r for r in whole.to_dict()["sections"]["sweep"]["tiny-llama"]["rows"] if r["part"] == "tokens"]
        assert {"sequential", "chunked", "processes"} <= {row["mode"] for row in rows}
        for row in rows:
            count = row["looked_at"]
            assert row["requests"] >= 8 and row["differ"] == 0
            assert count > 0 and row["explained"] == f"{count} of {count}"

    def test_recordings_of_each_mode_are_written(self, whole: Suite) -> None:
        found = recordings(whole.record)
        assert {"sequential", "chunked", "processes"} <= {recording.mode for recording in found}
        assert all(recording.tokens_identical for recording in found)
        assert any(recording.samples for recording in found), "one run may be over before the monitor looks again"

    def test_peers_and_processes_are_compared(self, whole: Suite) -> None:
        sections = whole.to_dict()["sections"]
        peers = {row["peer"]: row for row in sections["peers"]["tiny-llama"]["rows"]}
        assert peers["HF generate"]["tokens_as_ours"] == "3 of 3" and "splitwiser_lab" in peers
        hosts = sections["hostbound"]["tiny-llama"]["rows"]
        assert [(row["processes"], row["sharing"]) for row in hosts] == [(1, "plain"), (2, "plain")]
        assert hosts[0]["over_one_process"]["median"] == 1.0

    def test_tables_show_it_all(self, whole: Suite) -> None:
        console = Console(width=250)
        with console.capture() as capture:
            for table in tables(whole):
                console.print(table)
        said = capture.get()
        assert all(f"{section}: tiny-llama" in said for section in SECTIONS)
        assert "figures to reach" in said and "left out" in said


def test_a_section_that_breaks_costs_nothing_but_itself(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setitem(suite_module._RUNS, "overlap", broken)
    found = Suite([model], ("overlap", "peers"), device="cpu", repeats=1, plan=PLAN, path=tmp_path / "s.json").run()
    sections = json.loads((tmp_path / "s.json").read_text())["sections"]
    [item] = sections["overlap"]["tiny-llama"]["left_out"]
    assert "illegal memory access" in item["why"] and sections["peers"]["tiny-llama"]["rows"]
    assert found.verdicts()


def test_a_mode_that_breaks_is_left_out_and_the_others_go_on(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sl.Engine.set_mode

    def set_mode(self: Any, mode: str, **options: Any) -> None:
        if mode == "chunked":
            raise sl.LaneError("the lane died")
        real(self, mode, **options)

    monkeypatch.setattr(sl.Engine, "set_mode", set_mode)
    found = Suite([model], ("overlap", "sweep"), device="cpu", repeats=1, plan=PLAN).run().to_dict()["sections"]
    for section in ("overlap", "sweep"):
        modes = {row["mode"] for row in found[section]["tiny-llama"]["rows"]}
        assert "processes" in modes and "chunked" not in modes
        assert any("the lane died" in item["why"] for item in found[section]["tiny-llama"]["left_out"])


def test_a_limit_that_breaks_or_has_no_time_costs_only_itself(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> float:
        raise sl.LaneError("the lane died")

    monkeypatch.setattr(overlap_module, "limit_in", broken)
    found = Suite([model], ("overlap",), device="cpu", repeats=1, plan=PLAN).run().to_dict()["sections"]["overlap"]
    rows = {row["mode"]: row for row in found["tiny-llama"]["rows"]}
    assert rows["processes"]["gain"] and rows["processes"]["limit"] is None
    assert any("limit of processes" in item["what"] for item in found["tiny-llama"]["left_out"])


@pytest.mark.parametrize(
    ("mode", "device", "does"),
    [
        ("partitioned:decode_sms=48", "cuda", True),
        ("mps", "cuda", True),
        ("processes", "cuda", False),
        ("processes", "cpu", True),
        ("streams", "cuda", False),
        ("chunked:chunk_tokens=256", "cuda", False),
        ("auto", "cuda", False),
    ],
)
def test_which_modes_divide_the_device(mode: str, device: str, does: bool) -> None:
    assert overlap_module.divides(mode, device) is does


def test_profiling_comes_after_all_that_is_timed_in_this_process() -> None:
    suite = Suite(("a", "b"), ("kernels", "overlap", "hostbound", "efficiency"), device="cpu")
    assert suite._todo()[:6] == [
        ("a", "efficiency"), ("a", "overlap"), ("b", "efficiency"), ("b", "overlap"), ("b", "kernels"), ("a", "kernels")
    ]  # fmt: skip
    assert [section for _, section in suite._todo()[6:]] == ["hostbound"]


@pytest.mark.parametrize(("loads", "measured"), [(0, 2), (1, 1), (9, 2)])
def test_only_the_loads_that_were_asked_for(
    model: str, monkeypatch: pytest.MonkeyPatch, loads: int, measured: int
) -> None:
    """The others are said to be left out; after the first load no round is spent on warming up."""
    seen: list[tuple[Any, bool]] = []
    monkeypatch.setattr(overlap_module, "_measure", lambda job, modes, shape, until, warm: seen.append((shape, warm)))
    plan = replace(PLAN, overlaps=(*PLAN.overlaps, Shape(32, 1, 16)))
    found = Suite([model], ("overlap",), device="cpu", repeats=1, plan=plan, loads=loads).run().to_dict()
    assert seen == [(shape, number > 0) for number, shape in enumerate(plan.overlaps[:measured])]
    left_out = [item["what"] for item in found["sections"]["overlap"]["tiny-llama"]["left_out"]]
    assert [str(shape) in left_out for shape in plan.overlaps] == [number >= measured for number in range(2)]


def test_it_ends_in_its_time_and_says_what_it_had_no_time_for(model: str) -> None:
    begun = time.monotonic()
    found = Suite([model], ("overlap", "sweep"), device="cpu", repeats=500, seconds=6, plan=PLAN).run().to_dict()
    assert time.monotonic() - begun < 40
    left_out = [i for s in found["sections"].values() for i in s["tiny-llama"]["left_out"]]
    assert any("no time" in item["why"] for item in left_out)
    assert found["sections"]["sweep"]["tiny-llama"]["rows"], "what was measured until then is kept"


@pytest.mark.parametrize(
    "settings", [{"sections": ("speed",)}, {"repeats": 0}, {"seconds": 0}, {"shapes": ()}, {"loads": -1}]
)
def test_nonsense_is_refused_before_anything_runs(settings: dict[str, Any]) -> None:
    with pytest.raises(sl.WorkloadError):
        Suite(device="cpu", **settings)


def test_the_command_runs_a_section(model: str, tmp_path: Path) -> None:
    words = ["bench", "--suite", "gpu", "--shapes", model, "--sections", "peers", "--device", "cpu", "--repeats", "1"]
    done = CliRunner().invoke(app, [*words, "--seconds", "60", "--json", str(tmp_path / "s.json")])
    assert done.exit_code == 0, done.output
    assert "peers: tiny-llama" in done.output and "figures to reach" in done.output
    assert list(json.loads((tmp_path / "s.json").read_text())["sections"]) == ["peers"]
    assert CliRunner().invoke(app, ["bench", "--suite", "warp"]).exit_code != 0
