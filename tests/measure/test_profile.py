"""The profile's figures follow from its samples; a trace is believed only when the kernels are in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitwiser_lab import Engine, RequestError
from splitwiser_lab.measure import bench
from splitwiser_lab.measure.profile import PhaseProfile, profile_phases
from splitwiser_lab.measure.torch_trace import check_trace, trace_kernels
from splitwiser_lab.predict.ceilings import Ceilings
from splitwiser_lab.predict.kernels import Kernels
from splitwiser_lab.predict.work import decode, prefill, work

KERNELS = Kernels(
    Ceilings("made up", "float32", 1e9, 1e8, "a test"), ((1, 1e-9), (64, 8e-9)), 1e9, 1e-9, 1e-5, 1e-5, False
)


@pytest.fixture
def profile(engine: Engine) -> PhaseProfile:
    return profile_phases(engine, (16, 40), (1, 3), new_tokens=5, repeats=2, kernels=KERNELS)


def test_every_shape_has_both_phases(profile: PhaseProfile, engine: Engine):
    shapes = [(t.phase, t.batch, t.tokens) for t in profile.timings]
    assert shapes == [(p, b, t + 2 * (p == "decode")) for p in ("prefill", "decode") for b in (1, 3) for t in (16, 40)]
    assert [len(t.samples) for t in profile.of("prefill")] == [2] * 4
    assert [len(t.samples) for t in profile.of("decode")] == [8] * 4
    assert engine.mode == "sequential"


def test_rates_are_work_over_time(profile: PhaseProfile, engine: Engine):
    read, step = profile.of("prefill")[-1], profile.of("decode")[-1]
    assert read.work.flops == work(engine.config, prefill(40, 3), 4).flops
    assert step.work == work(engine.config, decode(42, 3), 4)
    assert read.flops_per_s == pytest.approx(read.work.flops / read.seconds)
    assert step.bytes_per_s == pytest.approx(step.work.bytes / step.seconds)
    assert read.tokens_per_s == pytest.approx(120 / read.seconds)
    assert step.tokens_per_s == pytest.approx(3 / step.seconds)
    assert step.kv_bytes == 3 * 42 * engine.config.kv_bytes_per_token(4)
    assert read.error == pytest.approx(read.predicted_s / read.seconds - 1)


def test_prompts_are_predicted_as_the_engine_groups_them(engine: Engine):
    """At most 512 tokens go into one prefill batch here: four prompts of 200 make two."""
    read = profile_phases(engine, (200,), (4,), new_tokens=4, repeats=1, kernels=KERNELS).of("prefill")[0]
    assert read.work.bytes == 2 * work(engine.config, prefill(200, 2), 4).bytes


def test_the_mode_comes_back(engine: Engine):
    engine.set_mode("chunked")
    engine.generate([1, 2, 3], 2)
    profile_phases(engine, (16,), (1,), new_tokens=2, repeats=1, kernels=KERNELS)
    engine.generate([1, 2, 3], 2)
    assert engine.mode == "chunked"


def test_rows_and_json_say_where_it_was_measured(profile: PhaseProfile):
    assert len(profile.rows()) == 8 and {row["bound by"] for row in profile.rows()} <= {"compute", "memory"}
    written = json.loads(json.dumps(profile.to_dict()))
    assert written["hardware"] and written["versions"] and written["ceilings"]["flops_per_s"] == 1e9
    assert written["rows"][0]["samples_s"] == list(profile.timings[0].samples)


def test_prompts_that_do_not_fit_are_refused(engine: Engine):
    with pytest.raises(RequestError):
        profile_phases(engine, (engine.longest_request,), (1,), kernels=KERNELS)


class TestTrace:
    def test_a_trace_of_a_lane_in_this_process_is_complete(self, engine: Engine, tmp_path: Path):
        trace = trace_kernels(engine, list(range(20)), tmp_path / "new" / "trace.json", 2)
        assert trace.complete and "products of matrices" in trace.verdict
        assert json.loads(trace.path.read_text())["traceEvents"]
        assert sum(trace.kernels.values()) > 10

    def test_lanes_in_other_processes_leave_a_trace_without_the_work_and_it_says_so(
        self, engine: Engine, tmp_path: Path
    ):
        engine.set_mode("processes")
        trace = trace_kernels(engine, list(range(20)), tmp_path / "trace.json", 2)
        assert not trace.complete and "trace mode 'sequential'" in trace.verdict

    def test_a_gpu_without_the_right_to_profile_is_found_out(self, tmp_path: Path):
        path = tmp_path / "trace.json"
        path.write_text(json.dumps({"traceEvents": [{"cat": "cpu_op", "name": "aten::mm"}, {"cat": "cuda_runtime"}]}))
        assert not check_trace(path, on_gpu=True, mode="sequential").complete
        assert "right to profile" in check_trace(path, on_gpu=True, mode="sequential").verdict
        path.write_text(json.dumps({"traceEvents": [{"cat": "kernel", "name": "sm90_xmma_gemm_bf16"}] * 3}))
        assert check_trace(path, on_gpu=True, mode="streams").kernels == {"sm90_xmma_gemm_bf16": 3}


def test_the_bench_shows_how_far_predictions_lie_off(
    profile: PhaseProfile, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "profile_phases", lambda *_, **__: profile)
    for figure, phase in zip(bench._predictions(engine, 2), ("prefill", "decode"), strict=True):
        timings = profile.of(phase)
        assert (figure.name, figure.unit, figure.targets) == (f"predicted {phase} times, off by", "%", {"": 25})
        assert figure.ours == [pytest.approx(100 * abs(t.predicted_s - t.seconds) / t.seconds) for t in timings]
        assert f"{timings[0].batch} × {timings[0].tokens}: " in figure.note
    assert bench._limit(25, "%") == "≤ 25 %"
