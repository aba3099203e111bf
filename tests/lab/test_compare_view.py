"""lab.compare: the prediction is drawn before anything runs, and the measurement beside it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeEngine
from tiny_models import tiny

from splitwiser_lab import lab
from splitwiser_lab.lab import compare_view
from splitwiser_lab.lab.compare_view import Work, expected_gap_ms


def test_the_prediction_is_published_first_and_then_both(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []
    monkeypatch.setattr(compare_view, "publish", lambda bundle: events.append(bundle["text/plain"]))
    measure = compare_view.run_modes

    def run(*given: Any, **settings: Any) -> Any:
        events.append("measuring")
        return measure(*given, **settings)

    monkeypatch.setattr(compare_view, "run_modes", run)
    work = {"prompt_tokens": 24, "output_tokens": 8, "rate": 50.0, "requests": 4}
    found = lab.compare(make_engine(), ["sequential", "chunked"], repeats=1, reference=tiny("llama"), **work)
    assert found is not None and [run.mode for run in found.runs] == ["sequential", "chunked"]
    predicted, measuring, both = events
    assert measuring == "measuring"
    assert "sequential, predicted" in predicted and "measured" not in predicted.replace("not measured", "")
    assert "chunked, measured" in both and "tokens identical in all modes" in both
    assert "identical" in capsys.readouterr().out


def test_a_prompt_costs_the_others_less_in_slices_and_least_on_a_lane_of_its_own(make_engine: MakeEngine) -> None:
    engine = make_engine(chunk_tokens=16, mode="chunked")
    gaps = expected_gap_ms(engine, ["sequential", "chunked", "processes"], Work(prompt_tokens=200, output_tokens=8))
    longer = expected_gap_ms(engine, ["sequential", "processes"], Work(prompt_tokens=240, output_tokens=8))
    assert gaps["chunked"] < gaps["sequential"] < longer["sequential"]
    assert gaps["processes"] > 0


def test_the_sliders_say_what_they_set_and_in_what_unit(make_engine: MakeEngine) -> None:
    view = compare_view._View(make_engine(), ["sequential"], Work(prompt_tokens=48, rate=3), 1, None)
    labels = {knob.label: [text for text, _ in knob.choices] for knob in view.knobs}
    assert labels["prompt"][1] == "48 tokens" and labels["output"][0] == "8 tokens"
    assert "3 /s" in labels["arrival rate"]
    assert {knob.name for knob in view.knobs} < set(Work.__dataclass_fields__)
