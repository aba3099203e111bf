"""The Chrome trace holds what the timeline holds: each batch, each request's stages, each flip."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitwiser_lab import Workload
from splitwiser_lab.cli import app
from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.chrome_trace import chrome_trace, save_chrome_trace
from splitwiser_lab.measure.recording import Recording
from splitwiser_lab.measure.sources import Sample
from splitwiser_lab.timeline import ModeChange, RequestRecord, Span, Timeline

TIMELINE = Timeline(
    spans=(
        Span("prefill", "prefill", 0.5, 0.75, 100, 0, 1, "streams"),
        Span("decode", "decode", 0.6, 0.8, 0, 3, 3, "x"),
    ),
    requests=(
        RequestRecord(7, 100, 0.25, (0.75, 0.8), 0.5, 0.75, 0.8, "length"),
        RequestRecord(8, 10, 0.3),  # never scheduled
    ),
    modes=(ModeChange(0.0, "streams"), ModeChange(0.55, "chunked", {"chunk_tokens": 64})),
)


def events(kind: str, **wanted: object) -> list[dict[str, object]]:
    found = chrome_trace(TIMELINE, (Sample(0.1, {"power_w": 300.0, "temperature_c": None}),))["traceEvents"]
    return [e for e in found if e["ph"] == kind and all(e.get(k) == v for k, v in wanted.items())]


def test_batches_are_slices_on_the_thread_of_their_lane() -> None:
    names = {e["tid"]: e["args"]["name"] for e in events("M", name="thread_name")}
    prefill, decode = events("X")
    assert (prefill["ts"], prefill["dur"], prefill["cat"]) == (500_000, 250_000, "prefill")
    assert (names[prefill["tid"]], names[decode["tid"]]) == ("lane prefill", "lane decode")
    assert decode["args"]["decode_tokens"] == 3


def test_requests_are_async_tracks_with_their_stages() -> None:
    stages = [(e["name"], e["ts"]) for e in events("b", id=7)]
    assert stages == [("request 7", 250_000), ("waiting", 250_000), ("prefill", 500_000), ("decode", 750_000)]
    assert [(e["name"], e["ts"]) for e in events("e", id=7)][-1] == ("request 7", 800_000)
    assert [e["ts"] for e in events("n", id=7)] == [750_000]
    assert [e["name"] for e in events("b", id=8)] == ["request 8", "waiting"], "it got no further"
    assert len(events("b")) == len(events("e")), "every stage that begins ends"


def test_flips_are_global_instants_and_readings_counters() -> None:
    assert [(e["name"], e["ts"], e["s"]) for e in events("i")] == [
        ("mode streams", 0, "g"),
        ("mode chunked", 550_000, "g"),
    ]
    assert [(e["name"], e["args"]) for e in events("C")] == [("power_w", {"value": 300.0})], "what was N/A is left out"


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_command_writes_the_trace_of_a_recording(engine: Engine, tmp_path: Path, name: str) -> None:
    recorded = Recording.of(engine.serve(Workload.closed(2, 9, 3)), engine, {}).save(tmp_path / "run.json.gz")
    done = CliRunner().invoke(app, ["trace", str(recorded), "--out", str(tmp_path / name)])
    assert done.exit_code == 0, done.output
    data = (tmp_path / name).read_bytes()
    written = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    assert sum(e["ph"] == "X" for e in written["traceEvents"]) == len(Recording.load(recorded).timeline.spans)


def test_an_empty_timeline_is_a_trace_too(tmp_path: Path) -> None:
    assert json.loads(save_chrome_trace(Timeline((), ()), tmp_path / "t.json").read_text())["traceEvents"]
