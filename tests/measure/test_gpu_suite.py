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
from splitwiser_lab.measure.gpu_suite.job import summary
from splitwiser_lab.measure.gpu_suite.plan import SECTIONS, SMALL, ChatLimits
from splitwiser_lab.measure.gpu_suite.suite import Suite
from splitwiser_lab.measure.gpu_suite.sweep import goodput
from splitwiser_lab.measure.gpu_suite.tables import tables
from splitwiser_lab.measure.gpu_suite.verdicts import verdicts
from splitwiser_lab.measure.overlap import Shape
from splitwiser_lab.measure.recording import recordings
from splitwiser_lab.timeline import RequestRecord, Span, Timeline


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
        assert all(recording.tokens_identical and recording.samples for recording in found)

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


class TestVerdicts:
    def judge(self, section: str, rows: list[dict[str, Any]], shape: str = "llama-3.2-1b-shape") -> dict[str, Any]:
        document = {
            "shapes": [shape],
            "limits": {"ttft_ms": 500.0, "itl_ms": 30.0},
            "sections": {section: {shape: {"rows": rows, "left_out": []}}},
        }
        return {verdict.figure: verdict for verdict in verdicts(document)}

    def value(self, *samples: float) -> dict[str, Any]:
        return summary(list(samples))

    def row(self, mode: str, goodput: float, itl: float = 10, ttft: float = 100, tok_s: float = 1000) -> dict[str, Any]:
        names = {"goodput": goodput, "p99_itl_ms": itl, "median_ttft_ms": ttft, "output_throughput": tok_s}
        values = {name: self.value(value) for name, value in names.items()}
        return {"part": "rate", "fraction": 0.7, "mode": mode, **values}

    def tokens(self, mode: str, explained: str = "4 of 4") -> dict[str, Any]:
        looked_at = int(explained.split()[-1]) if explained else 0
        return {"part": "tokens", "mode": mode, "differ": 9, "looked_at": looked_at, "explained": explained}

    def test_nothing_measured_is_no_verdict(self) -> None:
        assert {verdict.word for verdict in self.judge("peers", []).values()} == {"not measured"}

    def test_a_mode_whose_tokens_are_not_explained_wins_nothing(self) -> None:
        others = ("streams", "mps", "processes")
        rates = [self.row("sequential", 1.0, itl=40), *(self.row(mode, 2.0) for mode in others)]
        said = [self.tokens("sequential"), self.tokens("streams")]
        name, good = "tokens, read by transformers", "most goodput over the rates, TTFT ≤ 500 ms"
        found = self.judge("sweep", [*rates, *said, self.tokens("mps", "3 of 4"), self.tokens("processes", "")])
        assert found[name].reached is False and found[name].bound == "mps, processes"
        assert found[name].measured == "sequential 4 of 4, streams 4 of 4, mps 3 of 4, processes not looked at"
        assert any(figure.startswith(good) and "streams 2.00/s" in v.measured for figure, v in found.items())
        assert not any(v.measured.startswith(("mps:", "processes:")) for v in found.values())
        assert self.judge("sweep", [*rates, *said])[name].reached is True

        def winners(rows: list[dict[str, Any]]) -> list[bool | None]:
            return [v.reached for figure, v in self.judge("sweep", rows).items() if figure.startswith(good)]

        assert winners([*rates, *said]) == [True]
        assert winners(rates) == [None], "nobody read them"
        assert winners([*rates, self.tokens("sequential", "3 of 4"), self.tokens("streams")]) == [None]

    def test_the_gain_counts_only_with_a_gentle_decode(self) -> None:
        load = {"prefill_tokens": 2048, "decode_batch": 32, "context": 1024}

        def row(mode: str, gain: float, slowdown: float) -> dict[str, Any]:
            return {**load, "mode": mode, "gain": self.value(gain), "decode_slowdown": self.value(slowdown)}

        rough, gentle = row("partitioned:decode_sms=32", 1.5, 2.0), row("partitioned:decode_sms=64", 1.31, 1.3)
        streams = row("streams", 1.9, 1.0)
        name = "overlap gain, partitioned or auto, 2048 with 32@1024"
        assert self.judge("overlap", [rough, gentle, streams])[name].reached is True
        assert "decode_sms=64" in self.judge("overlap", [rough, gentle, streams])[name].measured
        assert self.judge("overlap", [rough, streams])[name].reached is False
        assert self.judge("overlap", [gentle], "llama-3.1-8b-shape")[name].target.startswith("≥ 1.25")

    def test_a_missed_gain_says_what_each_split_could_reach(self) -> None:
        load = {"prefill_tokens": 2048, "decode_batch": 32, "context": 1024}
        split = {**load, "mode": "partitioned:decode_sms=64", "gain": self.value(1.2), "limit": self.value(1.31)}
        auto = {**load, "mode": "auto", "gain": self.value(1.21), "limit": None, "decode_slowdown": self.value(1.5)}
        name = "overlap gain, partitioned or auto, 2048 with 32@1024"
        rough = self.judge("overlap", [{**split, "decode_slowdown": self.value(1.6)}, auto])[name]
        assert rough.reached is False
        assert "alone on its SMs: partitioned:decode_sms=64 1.31; no decode step within 1.4×" in rough.bound
        gentle = self.judge("overlap", [{**split, "decode_slowdown": self.value(1.3)}, auto])[name]
        assert gentle.bound.endswith("decode_sms=64 1.31")
        reached = {**split, "gain": self.value(1.3), "decode_slowdown": self.value(1.3)}
        assert self.judge("overlap", [reached])[name].bound == ""

    def test_a_missed_phase_says_where_its_time_goes(self) -> None:
        case = {"phase": "decode", "batch": 32, "tokens": 1024, "lengths": "ragged"}
        times = {"ms": 2.0, "undisturbed_ms": 1.6, "products_ms": 1.2, "attention_ms": 0.4, "rest_ms": 0.3}
        shares = {"products_share": 0.88, "attention_share": 0.6}
        kernels = {**case, **{name: self.value(value) for name, value in (times | shares).items()}}
        kernels["idle_ms"] = self.value(0.1)
        shape = "llama-3.2-1b-shape"

        def judge(share: float, *rows: Any) -> Any:
            sections = {"efficiency": [{**case, "share": self.value(share)}], "kernels": list(rows)}
            document = {
                "shapes": [shape],
                "limits": {"ttft_ms": 500.0, "itl_ms": 30.0},
                "sections": {name: {shape: {"rows": rows, "left_out": []}} for name, rows in sections.items()},
            }
            return next(verdict for verdict in verdicts(document) if verdict.figure.startswith("decode 32@1024"))

        assert judge(0.57, {**kernels, "lengths": "equal"}, kernels).bound == (
            "products at 88% of the ceiling: 60% of the time, attention at 60% of the ceiling: 20% of the time, "
            "rest: 15% of the time, idle: 5% of the time (profiled, which takes 1.25× as long)"
        )
        assert judge(0.57).bound == "" and judge(0.7, kernels).bound == ""
        assert "idle" not in judge(0.57, {**kernels, "idle_ms": None}).bound

    def test_goodput_is_judged_against_the_better_of_both_rivals(self) -> None:
        rows = [self.row("sequential", 4), self.row("chunked", 10), self.row("auto:itl_limit_ms=30", 12)]
        rows += [self.tokens(row["mode"]) for row in rows]
        [found] = [v for name, v in self.judge("sweep", rows).items() if name.startswith("most goodput")]
        assert found.reached is False and found.measured.startswith("1.20×: auto")

    def test_at_seventy_percent_all_three_conditions_count(self) -> None:
        alone = self.row("sequential", 4, itl=20, ttft=100)
        good = self.row("auto:itl_limit_ms=30", 4, itl=9, ttft=120)
        slow = self.row("auto:itl_limit_ms=30", 4, itl=9, ttft=190)
        name = "at 70 % of sequential's capacity, against sequential"
        read = [self.tokens("sequential"), self.tokens("auto:itl_limit_ms=30")]
        assert self.judge("sweep", [alone, good, *read])[name].reached is True
        assert self.judge("sweep", [alone, slow, *read])[name].reached is False

    def test_a_peer_is_found_under_its_version(self) -> None:
        rows = [{"peer": "vLLM 0.24.0", "ours_over_theirs": self.value(1.1, 0.9, 1.05)}]
        assert self.judge("peers", rows)["output tok/s against vLLM"].word == "reached"


def test_goodput_keeps_both_limits_of_each_request() -> None:
    def request(number: int, first: float, gaps: list[float]) -> RequestRecord:
        times = [first]
        for gap in gaps:
            times.append(times[-1] + gap)
        return RequestRecord(number, 10, 0.0, tuple(times), 0.0, first, times[-1], "length")

    requests = (
        request(0, 0.1, [0.01] * 50),
        request(1, 0.6, [0.01] * 50),  # the first token comes late
        request(2, 0.1, [0.01] * 10 + [0.2]),  # one gap of eleven is long: above the 99th percentile
        request(3, 0.1, []),
        RequestRecord(4, 10, 0.0),
    )
    timeline = Timeline((Span("main", "decode", 0.0, 2.0, 0, 1, 1, "sequential"),), requests)
    assert goodput(timeline, ChatLimits(500, 30)) == pytest.approx(2 / 2.0)
    assert goodput(timeline, ChatLimits(500, 1000)) == pytest.approx(3 / 2.0)
