"""Recordings: what is saved comes back the same, in the classes of a live run; what is damaged says so."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build
from typer.testing import CliRunner

import splitwiser_lab as sl
from splitwiser_lab.cli import app
from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure import recording as recording_module
from splitwiser_lab.measure.mode_spec import ModeSpec
from splitwiser_lab.measure.monitor import Monitor
from splitwiser_lab.measure.recording import Recording, by_work, recordings
from splitwiser_lab.metrics import Metrics
from splitwiser_lab.timeline import Timeline

WORK = sl.Workload.poisson(300.0, requests=4, prompt_tokens=24, output_tokens=6)


@pytest.fixture
def recorded(engine: Engine) -> Recording:
    engine.set_mode("chunked", chunk_tokens=16)
    with Monitor("cpu", 0.02) as monitor:
        result = engine.serve(WORK)
    return Recording.of(result, engine, WORK, tokens_identical=True, tokens_against="itself", monitor=monitor)


class TestRoundTrip:
    @pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
    def test_everything_comes_back(self, recorded: Recording, tmp_path: Path, name: str) -> None:
        loaded = Recording.load(recorded.save(tmp_path / "deep" / name))
        assert loaded == recorded
        assert isinstance(loaded.timeline, Timeline) and isinstance(loaded.metrics, Metrics)
        assert loaded.metrics == recorded.metrics and loaded.metrics.completed == 4
        assert (loaded.mode, loaded.options) == ("chunked", {"chunk_tokens": 16})
        assert loaded.hardware["device"] == "cpu" and {"torch", "python"} <= set(loaded.versions)

    def test_it_tells_the_run_to_the_microsecond(self, engine: Engine) -> None:
        result = engine.serve(WORK)
        recorded = Recording.of(result, engine, WORK)
        for ours, theirs in zip(recorded.timeline.spans, result.timeline.spans, strict=True):
            assert ours.start == pytest.approx(theirs.start, abs=1e-6) and ours.lane == theirs.lane
        assert recorded.metrics.ttft.p99 == pytest.approx(result.metrics.ttft.p99, abs=2e-3)
        assert recorded.tokens_identical is None, "nobody compared"

    def test_other_tools_find_the_figures_of_vllm_bench_serve_in_it(self, recorded: Recording, tmp_path: Path) -> None:
        raw = json.loads(gzip.decompress(recorded.save(tmp_path / "run.json.gz").read_bytes()))
        assert raw["schema"] == "splitwiser-lab/recording/1"
        assert raw["metrics"]["p99_itl_ms"] == recorded.metrics.itl.p99 and raw["workload"]["requests"] == 4

    def test_samples_of_the_run_are_kept_on_its_clock(self, engine: Engine) -> None:
        with Monitor("cpu", 0.01) as monitor:
            time.sleep(0.1)
            result = engine.serve(sl.Workload.poisson(20.0, requests=4, prompt_tokens=24, output_tokens=6))
            time.sleep(0.1)
        recorded = Recording.of(result, engine, {}, monitor=monitor)
        assert 0 < len(recorded.samples) < len(monitor.samples)
        assert all(0 <= sample.time <= result.timeline.duration for sample in recorded.samples)
        keys = {metric.key for metric in recorded.watched}
        assert keys and all(set(sample.values) <= keys for sample in recorded.samples)

    def test_the_same_run_gives_the_same_bytes(self, recorded: Recording, tmp_path: Path) -> None:
        a, b = (recorded.save(tmp_path / name).read_bytes() for name in ("a.json.gz", "b.json.gz"))
        assert a == b

    def test_a_closed_engine_cannot_be_recorded(self) -> None:
        with Engine.from_pretrained(build("llama"), kv_tokens=512, page_size=8) as engine:
            result = engine.generate([[1, 2, 3]], 2)
        with pytest.raises(sl.RecordingError, match="closed"):
            Recording.of(result, engine, {})

    def test_more_than_two_megabytes_are_refused(
        self, recorded: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recording_module, "MOST_BYTES", 1000)
        with pytest.raises(sl.RecordingError, match="record fewer requests"):
            recorded.save(tmp_path / "run.json")
        assert not list(tmp_path.iterdir())


class TestDamaged:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda raw: [], "schema is None"),
            (lambda raw: {**raw, "schema": "other/1"}, "no recording.*'other/1'"),
            (lambda raw: {**raw, "schema": "splitwiser-lab/recording/9"}, "update splitwiser-lab"),
            (lambda raw: {k: v for k, v in raw.items() if k != "hardware"}, "no entry 'hardware'"),
            (lambda raw: {**raw, "timeline": {"spans": [{}]}}, "damaged"),
            (lambda raw: {**raw, "samples": [{"time": "soon", "values": {}}]}, "damaged.*soon"),
        ],
    )
    def test_it_says_what_is_wrong(self, recorded: Recording, tmp_path: Path, change: Any, said: str) -> None:
        path = tmp_path / "run.json"
        path.write_text(json.dumps(change(recorded.to_dict())))
        with pytest.raises(sl.RecordingError, match=r"run\.json: .*" + said):
            Recording.load(path)

    def test_times_that_are_no_numbers_are_found_at_once(self, recorded: Recording, tmp_path: Path) -> None:
        raw = recorded.to_dict()
        raw["timeline"]["requests"][0]["token_times"] = ["x", "y"]
        (tmp_path / "run.json").write_text(json.dumps(raw))
        with pytest.raises(sl.RecordingError, match="damaged"):
            Recording.load(tmp_path / "run.json")

    def test_a_file_cut_off_missing_or_of_another_kind(self, recorded: Recording, tmp_path: Path) -> None:
        path = recorded.save(tmp_path / "run.json.gz")
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(sl.RecordingError, match=r"run\.json\.gz: it cannot be read"):
            Recording.load(path)
        with pytest.raises(sl.RecordingError, match="no such file"):
            Recording.load(tmp_path / "none.json")
        with pytest.raises(sl.RecordingError, match=r"end it in \.json"):
            recorded.save(tmp_path / "run.txt")


class TestFolders:
    def test_recordings_of_the_same_work_belong_together(self, engine: Engine, tmp_path: Path) -> None:
        other = sl.Workload.closed(2, 8, 2)
        for number, (mode, work) in enumerate(
            [("sequential", WORK), ("chunked", WORK), ("sequential", other), ("chunked:chunk_tokens=9", WORK)]
        ):
            ModeSpec.parse(mode).set(engine)
            Recording.of(engine.serve(work), engine, work).save(tmp_path / f"{number}.json.gz")
        (tmp_path / "bench.json").write_text('{"schema": "splitwiser-lab/bench/1"}')
        (tmp_path / "notes.txt").write_text("not a recording")
        found = by_work(recordings(tmp_path))
        assert [list(group) for group in found.values()] == [
            ["sequential", "chunked", "chunked (chunk_tokens=9)"],
            ["sequential"],
        ]
        assert all("on " in work and "requests of" in work for work in found)

    def test_a_folder_without_recordings_or_with_a_damaged_one_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(sl.RecordingError, match="no folder 'nowhere'"):
            recordings("nowhere")
        with pytest.raises(sl.RecordingError, match="splitwiser-lab record"):
            recordings(tmp_path)
        (tmp_path / "x.json").write_text("{")
        with pytest.raises(sl.RecordingError, match=r"x\.json: it cannot be read"):
            recordings(tmp_path)

    def test_the_shipped_ones_are_whole_and_small(self) -> None:
        [(work, modes)] = by_work(recordings("cpu")).items()
        assert {"sequential", "chunked", "processes"} <= set(modes) and "smollm2-135m" in work
        for recording in modes.values():
            assert (
                recording.samples
                and recording.tokens_identical
                and recording.metrics.completed == len(recording.timeline.requests)
            )


def test_mode_specs_are_read_as_they_are_written() -> None:
    spec = ModeSpec.parse("chunked:chunk_tokens=256")
    assert spec == ModeSpec("chunked", {"chunk_tokens": 256}) and str(spec) == "chunked:chunk_tokens=256"
    assert ModeSpec.parse("auto:itl_limit_ms=12.5").options == {"itl_limit_ms": 12.5}
    with pytest.raises(sl.ModeError, match="name=number"):
        ModeSpec.parse("chunked:256")
    with pytest.raises(sl.ModeError, match="no option 'speed'"):
        ModeSpec.parse("chunked:speed=1").check("cpu")


def test_the_command_records_each_mode(tmp_path: Path) -> None:
    build("llama", max_position_embeddings=512).save_pretrained(tmp_path / "tiny")
    words = ["record", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "tiny"), "--requests", "3"]
    words += ["--modes", "sequential,chunked:chunk_tokens=16", "--repeats", "1", "--rate", "100"]
    words += ["--prompt-tokens", "20", "--output-tokens", "4", "--kv-tokens", "2048"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    [(_, modes)] = by_work(recordings(tmp_path / "out")).items()
    assert set(modes) == {"sequential", "chunked (chunk_tokens=16)"}
    assert all(recording.tokens_identical and recording.model == "tiny" for recording in modes.values())
