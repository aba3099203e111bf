"""The replay: the live view over recorded runs, labelled as such, flipping between them at the same moment."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitwiser_lab.errors import RecordingError
from splitwiser_lab.lab.dashboard import figure, series
from splitwiser_lab.lab.dashboard.picture import picture
from splitwiser_lab.lab.dashboard.recorded import Replay, kv_use
from splitwiser_lab.lab.live_lab import replay
from splitwiser_lab.measure import shipped
from splitwiser_lab.measure.recording import Recording, recordings
from splitwiser_lab.timeline import RequestRecord, Span, Timeline


@pytest.fixture(scope="module")
def recorded() -> list[Recording]:
    """Those of a CPU that come with the package."""
    folder = shipped.find("recordings/cpu")
    assert folder is not None
    return recordings(folder)


@pytest.fixture
def played(recorded: list[Recording]) -> Replay:
    return Replay(recorded)


def at(source: Replay, seconds: float) -> None:
    """Stand at this moment."""
    source._seek(seconds)


def test_begins_stopped_at_the_beginning_with_every_recorded_mode(played: Replay, recorded: list[Recording]) -> None:
    frame = played.frame()
    assert frame.now == 0 and not played.active and frame.recorded
    there = [mode.mode for mode in played.modes if mode.available]
    assert there[:3] == ["sequential", "chunked", "processes"] and sorted(there) == sorted(r.label for r in recorded)
    assert {mode.reason for mode in played.modes if not mode.available} == {"not recorded"}


def test_says_everywhere_that_it_is_recorded_where_and_when(played: Replay, recorded: list[Recording]) -> None:
    frame = played.frame()
    assert recorded[0].machine in frame.heading and recorded[0].time_utc[:10] in frame.heading
    assert "RECORDED" in picture(frame) and "recorded" in frame.tokens.text


def test_a_flip_goes_on_in_the_other_recording_at_the_same_moment(played: Replay, recorded: list[Recording]) -> None:
    runs = {recording.label: recording.timeline for recording in recorded}
    at(played, 6.0)
    played.choose("processes")
    at(played, 12.0)
    frame = played.frame()
    assert [(part.label, part.start, part.end) for part in frame.parts] == [
        ("sequential", 0.0, 6.0),
        ("processes", 6.0, 12.0),
    ]
    assert frame.flips == [(6.0, "processes")]
    assert [part.timeline for part in frame.parts] == [runs["sequential"], runs["processes"]]
    assert frame.before is not None and frame.before.label == "sequential" and frame.before.end == 6.0
    assert frame.after is not None and frame.after.label == "processes" and frame.after.start == 6.0
    bars, _ = series.bars(frame, 12.0)
    assert all(bar.end <= 6.0 + 1e-9 for bar in bars if bar.lane == "main")
    assert all(bar.start >= 6.0 for bar in bars if bar.lane in ("prefill", "decode"))


def test_nothing_of_the_future_is_shown(played: Replay) -> None:
    at(played, 3.0)
    frame = played.frame()
    for points in (
        series.gaps(frame),
        series.kv_use(frame),
        series.rate(frame, "decode"),
        series.hardware(frame, "core_0"),
    ):
        assert max((t for t in points[0] if t is not None), default=0) <= 3.0
    assert all(bar.end <= 3.0 for bar in series.bars(frame, 3.0)[0])
    assert frame.running + frame.waiting <= 4


def test_plays_with_the_clock_stops_and_begins_again_after_the_end(played: Replay) -> None:
    played.turn("speed", 4.0)
    played.start()
    time.sleep(0.2)
    assert 0.4 < played.frame().now < 4 and played.active
    played.stop()
    stood = played.frame().now
    time.sleep(0.05)
    assert played.frame().now == stood and played.frame().state == "stopped"
    played.turn("moment", 40)
    assert played.frame().now == pytest.approx(played.duration)
    played.start()
    assert played.frame().now < 1


def test_going_back_forgets_the_flips_that_are_then_still_to_come(played: Replay) -> None:
    at(played, 6.0)
    played.choose("chunked")
    at(played, 2.0)
    frame = played.frame()
    assert frame.flips == [] or frame.flips == [(2.0, "chunked")]
    assert played.mode == "chunked" and frame.parts[-1].label == "chunked"


def test_the_controls_are_those_of_the_live_lab_and_the_recorded_ones_are_grey(played: Replay) -> None:
    knobs = {knob.name: knob for knob in played.knobs}
    assert {name for name, knob in knobs.items() if knob.why_not == "as recorded"} == {
        "rate",
        "prompt_tokens",
        "output_tokens",
    }
    assert not knobs["moment"].why_not and not knobs["speed"].why_not
    assert all(knob.value in [value for _, value in knob.choices] for knob in played.knobs)


def test_what_was_asked_for_is_written_in_whole_numbers_with_units(recorded: list[Recording]) -> None:
    asked = {"name": "w", "requests_per_s": 7.0833, "input_tokens_p50": 1029.5, "output_tokens_p50": 129.0}
    knobs = {knob.name: knob for knob in Replay([replace(recorded[0], workload=asked)]).knobs}
    written = [knobs[name].choices[0][0] for name in ("rate", "prompt_tokens", "output_tokens")]
    assert written == ["7.08 /s", "1,030 tokens", "129 tokens"]
    at_once = Replay([replace(recorded[0], workload={"name": "w"})])
    assert next(knob for knob in at_once.knobs if knob.name == "rate").choices[0][0] == "all at once"


def test_different_work_is_never_mixed(recorded: list[Recording]) -> None:
    other = replace(recorded[0], model="another model")
    source = Replay([*recorded, other])
    assert len([mode for mode in source.modes if mode.available]) == len(recorded)
    source.turn("work", other.work)
    assert [mode.mode for mode in source.modes if mode.available] == [other.label]
    assert "another model" in source.frame().heading


def test_draws_in_the_same_figure_as_the_live_lab(played: Replay) -> None:
    import plotly.graph_objects as go

    drawn = figure.build(go.Figure, played.frame().lines)
    for moment in (0.0, 5.0, played.duration):
        at(played, moment)
        figure.apply(drawn, figure.change(played.frame()))


def test_the_pool_s_use_follows_from_the_lengths() -> None:
    timeline = Timeline(
        (Span("main", "prefill", 0.0, 1.0, 20, 0, 1, "sequential"),),
        (RequestRecord(0, 15, 0.0, (1.0, 2.0, 3.0), 0.5, 1.0, 3.0, "length"), RequestRecord(1, 8, 0.0)),
    )
    recording = _recording(timeline)
    # 15 tokens hold two pages of 8, the second new token needs a third; the pool has eight.
    assert kv_use(recording) == ((0.0, 0.0), (0.5, 2 / 8), (2.0, 3 / 8), (3.0, 0.0))


@pytest.mark.parametrize(("identical", "said"), [(True, "identical"), (False, "NOT all"), (None, "not compared")])
def test_what_was_not_compared_when_recorded_is_not_called_identical(identical: bool | None, said: str) -> None:
    timeline = Timeline((Span("main", "decode", 0.0, 1.0, 0, 1, 1, "sequential"),), ())
    frame = Replay([_recording(timeline, tokens_identical=identical)]).frame()
    assert frame.tokens.holds is identical and frame.tokens.text.startswith(said)


def test_replay_without_a_front_end_runs_through_all_modes(
    recorded: list[Recording], capsys: pytest.CaptureFixture[str]
) -> None:
    view = replay(recorded, seconds=1.5)
    said = capsys.readouterr().out
    assert said.startswith("RECORDED.") and "since: processes" in said
    assert view.source.frame().state == "stopped"
    assert view.source.frame().after.output_tokens_per_s > 0, "it does not go on beyond the end of a run"


def test_nothing_to_play_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="no recording"):
        replay([])
    with pytest.raises(RecordingError):
        replay(tmp_path)


def _recording(timeline: Timeline, **changes: Any) -> Recording:
    values: dict[str, Any] = {
        **{"timeline": timeline, "model": "m", "random_weights": False, "dtype": "float32", "device": "cpu"},
        **{"kv_tokens": 64, "page_size": 8, "mode": "sequential", "options": {}, "workload": {"name": "w"}},
        **{"tokens_identical": True, "tokens_against": "transformers", "hardware": {"device_name": "a CPU"}},
        **{"versions": {}, "command": "c", "commit": "c", "time_utc": "2026-11-23T00:00:00+00:00"},
    }
    return Recording(**{**values, **changes})
