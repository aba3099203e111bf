"""Each phase alone: what is attributed to it, and what it refuses."""

from __future__ import annotations

import pytest
from fake_nvml import FakeNvml
from pipeline_models import model_of

from splitwiser_lab import RequestError
from splitwiser_lab.measure.sources_gpm import GpmSource
from splitwiser_lab.measure.sources_nvml import NvmlDevice, NvmlSource
from splitwiser_lab.pipelines import phase_profile
from splitwiser_lab.pipelines.kv import layout_of
from splitwiser_lab.pipelines.phase_profile import profile_phases
from splitwiser_lab.pipelines.phases import PromptBatch

BATCH = PromptBatch(0, ((1, 2, 3), (4, 5, 6)), (5, 5), (frozenset(),) * 2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A GPU whose counters can be read, though the model runs on a CPU."""
    nvml = FakeNvml()

    def sources(device: str) -> list:
        board = NvmlDevice(nvml, "GPU-1")
        return [GpmSource(board), NvmlSource(board)]

    monkeypatch.setattr(phase_profile, "open_sources", sources)
    return nvml


def test_a_gpus_counters_tell_the_mean_over_each_whole_phase(gpu: FakeNvml) -> None:
    model = model_of("llama")
    for phase in profile_phases(model, layout_of(model), "cpu", BATCH, seconds=0.12):
        assert (phase.sm_percent, phase.dram_percent, phase.memory_gb, phase.missing) == (61.0, 88.0, 5.0, {})
    assert len(gpu.gpm_times) == 2 and all(end - start >= 0.12 for start, end in gpu.gpm_times), "two readings a phase"
    assert gpu.users == 0


def test_counters_of_too_short_a_phase_are_no_figures(gpu: FakeNvml) -> None:
    model = model_of("llama")
    for phase in profile_phases(model, layout_of(model), "cpu", BATCH, seconds=1e-6):
        if phase.sm_percent is None:  # one pass takes longer on a busy machine
            assert "watch it longer" in phase.missing["SMs at work"] and phase.memory_gb == 5.0


def test_watching_changes_no_weight_and_repeats_whole_passes() -> None:
    model = model_of("llama")
    before = model.lm_head.weight.clone()
    prefill, decode = profile_phases(model, layout_of(model), "cpu", BATCH, seconds=0.5)
    assert len(prefill.samples_s) > 1 and len(decode.samples_s) > 4 and len(decode.samples_s) % 4 == 0
    assert prefill.tokens == 3 and decode.tokens == 5 and decode.kv_bytes > prefill.kv_bytes
    assert (model.lm_head.weight == before).all()


def test_what_was_not_told_has_its_reason() -> None:
    model = model_of("llama")
    batch = PromptBatch(0, ((1, 2, 3),), (3,), (frozenset(),))
    for phase in profile_phases(model, layout_of(model), "cpu", batch, seconds=0.01):
        assert phase.memory_gb and "memory in use" not in phase.missing
        assert "only a GPU" in phase.missing["DRAM bandwidth"]
    for phase in profile_phases(model, layout_of(model), "cpu", batch, seconds=0):
        assert phase.memory_gb is None and not phase.missing, "nothing was to be watched"


def test_a_batch_without_decode_is_refused() -> None:
    model = model_of("llama")
    with pytest.raises(RequestError, match="2 new tokens"):
        profile_phases(model, layout_of(model), "cpu", PromptBatch(0, ((1, 2),), (1,), (frozenset(),)))
