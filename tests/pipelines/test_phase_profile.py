"""Each phase alone: what is attributed to it, and what it refuses."""

from __future__ import annotations

import pytest
from pipeline_models import model_of

from splitwiser_lab import RequestError
from splitwiser_lab.measure.sources import Sample
from splitwiser_lab.pipelines.kv import layout_of
from splitwiser_lab.pipelines.phase_profile import mean_inside, profile_phases
from splitwiser_lab.pipelines.phases import PromptBatch


def test_only_samples_whose_whole_time_lies_inside_count() -> None:
    samples = [Sample(time, {"sm": value}) for time, value in ((0.9, 1), (1.1, 2), (1.3, 3), (1.5, 5), (1.7, 9))]
    assert mean_inside(samples, "sm", 1.0, 1.6) == 4, "of 1.1, 0.1 seconds lie before; 1.7 is after"
    assert mean_inside(samples, "dram", 1.0, 1.6) is None
    assert mean_inside(samples, "sm", 1.0, 1.2) is None


def test_watching_changes_no_weight_and_repeats_whole_passes() -> None:
    model = model_of("llama")
    before = model.lm_head.weight.clone()
    batch = PromptBatch(0, ((1, 2, 3), (4, 5, 6)), (5, 5), (frozenset(),) * 2)
    prefill, decode = profile_phases(model, layout_of(model), "cpu", batch, seconds=0.5)
    assert len(prefill.samples_s) > 1 and len(decode.samples_s) > 4 and len(decode.samples_s) % 4 == 0
    assert prefill.tokens == 3 and decode.tokens == 5 and decode.kv_bytes > prefill.kv_bytes
    assert (model.lm_head.weight == before).all()


def test_what_was_not_told_has_its_reason() -> None:
    model = model_of("llama")
    batch = PromptBatch(0, ((1, 2, 3),), (3,), (frozenset(),))
    for phase in profile_phases(model, layout_of(model), "cpu", batch, seconds=0.01):  # on a quiet machine, too short
        assert (phase.memory_gb is None) == ("watch it longer" in phase.missing.get("memory in use", ""))
        assert "only a GPU" in phase.missing["DRAM bandwidth"]
    for phase in profile_phases(model, layout_of(model), "cpu", batch, seconds=0):
        assert phase.memory_gb is None and not phase.missing, "nothing was to be watched"


def test_a_batch_without_decode_is_refused() -> None:
    model = model_of("llama")
    with pytest.raises(RequestError, match="2 new tokens"):
        profile_phases(model, layout_of(model), "cpu", PromptBatch(0, ((1, 2),), (1,), (frozenset(),)))
