"""The comparison, the reference's judgement, the overlap gain and the bench's arithmetic, on tiny models."""

from __future__ import annotations

import functools
import json
import pickle
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import build, generated, prompts_of, tiny

import splitwiser_lab as sl
from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.errors import LaneError
from splitwiser_lab.lab.comparison_report import notes
from splitwiser_lab.lanes.inline import InlineLane
from splitwiser_lab.measure import bench as bench_module
from splitwiser_lab.measure import overlap as overlap_module
from splitwiser_lab.measure.bench import Figure, bench
from splitwiser_lab.measure.compare import with_range
from splitwiser_lab.measure.overlap import WAITING, Overlap, measure_limit, measure_overlap
from splitwiser_lab.measure.peers import GenerateBatchPeer, GeneratePeer, OursPeer
from splitwiser_lab.measure.reference import Reference, TokenCheck
from splitwiser_lab.model.batch import Batch
from splitwiser_lab.model.runner import GraphRunner
from splitwiser_lab.timeline import Timeline

WORK = sl.Workload.poisson(200.0, requests=5, prompt_tokens=24, output_tokens=8)


@pytest.fixture(scope="module")
def comparison() -> Any:
    return sl.compare(tiny("llama"), WORK, repeats=2, overlap=False, kv_tokens=4096)


class TestReference:
    def test_its_tokens_are_those_of_generate(self) -> None:
        [prompt] = prompts_of(20)
        assert Reference(tiny("qwen2")).tokens(prompt, 12) == generated(tiny("qwen2"), prompt, 12)

    def test_ignore_eos_goes_on_to_the_full_length(self) -> None:
        [prompt] = prompts_of(20)
        end = generated(tiny("llama"), prompt, 1)[0]
        model = build("llama", eos_token_id=end)
        assert Reference(model).tokens(prompt, 8) == [end]
        assert len(Reference(model).tokens(prompt, 8, ignore_eos=True)) == 8

    def test_a_difference_in_float32_is_never_explained(self) -> None:
        [prompt] = prompts_of(20)
        judge = Reference(tiny("llama"))
        theirs = judge.tokens(prompt, 6)
        ours = [*theirs[:3], (theirs[3] + 1) % 199, *theirs[4:]]
        check = judge.check(prompt, ours, theirs)
        assert (check.first_difference, check.identical, check.explained) == (3, False, False)
        assert check.gap > 0 and check.resolution == 0 and "NOT explained" in str(check)

    def test_half_precision_explains_a_near_tie_and_nothing_else(self) -> None:
        model = build("llama").to(torch.bfloat16)
        [prompt] = prompts_of(20)
        judge = Reference(model)
        theirs = judge.tokens(prompt, 4)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0, -1].float()
        worst = int(logits.argmin())
        check = judge.check(prompt, [worst, *theirs[1:]], theirs)
        assert check.first_difference == 0 and not check.explained
        exact = build("llama").to(torch.bfloat16).float()
        with torch.inference_mode():
            right = exact(torch.tensor([prompt])).logits[0, -1]
            error = (right - logits).abs().max()
        assert check.gap == pytest.approx(float(right[theirs[0]] - right[worst]), rel=1e-3), "in float32"
        assert check.resolution == pytest.approx(2 * float(error), rel=1e-3) and check.resolution > 0
        assert TokenCheck(0, gap=check.resolution / 2, resolution=check.resolution).explained

    @pytest.mark.parametrize("kept", [199, 2], ids=["all logits", "two logits"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_continuation_judges_many_as_they_are_judged_one_by_one(
        self, dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("splitwiser_lab.measure.reference._KEPT", kept)
        [prompt] = prompts_of(20)
        judge = Reference(build("llama").to(dtype))
        theirs = judge.tokens(prompt, 8)
        others = [[*theirs[:n], (theirs[n] + 5) % 199, *theirs[n + 1 :]] for n in range(8)]
        others += [theirs, theirs[:3], [*theirs, 1]]
        one_by_one = [judge.check(prompt, ours, theirs) for ours in others]
        asked: list[int] = []
        real = judge.choices
        monkeypatch.setattr(judge, "choices", lambda *given: asked.append(1) or real(*given))
        continuation = judge.continuation(prompt, theirs)
        for ours, alone in zip(others, one_by_one, strict=True):
            found = continuation.check(ours)
            assert (found.first_difference, found.explained) == (alone.first_difference, alone.explained)
            assert found.gap == pytest.approx(alone.gap, rel=0.05, abs=1e-3)
            assert found.resolution == pytest.approx(alone.resolution, rel=0.3, abs=1e-6)
        assert len(asked) == 1 if kept == 199 else 1 < len(asked) <= 9, "a token that was not kept is asked for alone"

    def test_a_missing_token_is_a_difference(self) -> None:
        [prompt] = prompts_of(20)
        judge = Reference(tiny("llama"))
        theirs = judge.tokens(prompt, 6)
        check = judge.check(prompt, theirs[:5], theirs)
        assert check.first_difference == 5 and not check.explained


class TestCompare:
    def test_every_mode_that_runs_here_writes_the_reference(self, comparison: Any) -> None:
        assert [run.mode for run in comparison.runs] == ["sequential", "chunked", "processes", "auto"]
        assert comparison.tokens_identical and all(len(run.checks) == 2 for run in comparison.runs)
        assert [len(result.tokens) for run in comparison.runs for result in run.results] == [5] * 8

    def test_json_has_the_names_of_vllm_bench_serve(self, comparison: Any, tmp_path: Any) -> None:
        comparison.to_json(tmp_path / "out.json")
        found = json.loads((tmp_path / "out.json").read_text())
        assert found["tokens_identical"] is True and {"hardware", "versions", "command", "commit"} <= set(found)
        wanted = {"request_throughput", "output_throughput", "mean_ttft_ms", "p99_itl_ms", "max_itl_ms", "completed"}
        for run in found["runs"]:
            assert wanted | {"overlap_gain", "tokens_identical", "spread"} <= set(run)
            low, high = run["spread"]["mean_ttft_ms"]
            assert low <= run["mean_ttft_ms"] <= high

    def test_the_table_names_each_mode_and_its_verdict(self, comparison: Any) -> None:
        text = str(comparison)
        assert all(mode in text for mode in ("sequential", "chunked", "processes"))
        assert text.count("identical") == 4 and "…" not in text

    def test_a_gain_that_two_phases_cannot_have_is_not_to_be_believed(self, comparison: Any) -> None:
        first, *others = comparison.runs
        for together, disturbed in ((10.0, False), (70.0, True)):
            run = replace(first, overlaps=[Overlap(first.mode, 10.0, 10.0, together, 5.0)])
            found = replace(comparison, runs=[run, *others])
            assert ("Measure again" in str(found)) == disturbed == ("Not to be believed" in " ".join(notes(found)))

    def test_a_wrong_token_is_found_and_counted(self) -> None:
        other = build("llama", seed=1)
        found = sl.compare(
            tiny("llama"), WORK, ["sequential"], repeats=1, overlap=False, reference=other, kv_tokens=4096
        )
        assert not found.tokens_identical and len(found["sequential"].differences) == 5
        assert json.loads(found.to_json())["runs"][0]["tokens_identical"] is False

    def test_the_engine_it_was_given_keeps_its_mode_and_goes_on(self, engine: Engine) -> None:
        engine.set_mode("chunked")
        sl.compare(engine, WORK, ["sequential"], repeats=1, overlap=False, reference=tiny("llama"))
        assert engine.mode == "chunked" and engine.generate([[1, 2, 3]], 2).metrics.completed == 1

    @pytest.mark.parametrize(("arguments", "said"), [({"repeats": 0}, "repeats=0"), ({"modes": []}, "no modes")])
    def test_nonsense_is_refused(self, engine: Engine, arguments: dict[str, Any], said: str) -> None:
        with pytest.raises(sl.SplitwiserError, match=said):
            sl.compare(engine, WORK, reference=tiny("llama"), **arguments)

    def test_a_mode_that_cannot_run_is_refused_before_anything_runs(self, engine: Engine) -> None:
        said: list[str] = []
        with pytest.raises(sl.ModeError, match="cannot run on cpu"):
            sl.compare(engine, WORK, ["sequential", "mps"], reference=tiny("llama"), report=said.append)
        assert said == []

    def test_range(self) -> None:
        assert with_range([3.0, 1.0, 2.0], 1) == "2.0 (1.0–3.0)"
        assert with_range([1.0], 2) == "1.00" and with_range([], 2) == "n/a"


class TestOverlap:
    def test_gain_is_the_sum_of_both_shares(self) -> None:
        overlap = Overlap("processes", prefill_alone=1000, decode_alone=50, prefill=600, decode=40)
        assert overlap.gain == pytest.approx(0.6 + 0.8)
        assert overlap.decode_slowdown == pytest.approx(1.25)
        assert Overlap("sequential", 1000, 50, 1000, 0).decode_slowdown is None

    def test_both_phases_get_something_done_in_two_lanes_and_only_prefill_in_turns(self, engine: Engine) -> None:
        told: list[str] = []
        found = measure_overlap(
            engine, ["sequential", "processes"], 64, 2, 32, seconds=0.3, repeats=1, report=told.append
        )
        assert len(told) == 6 and told[-1] == "overlap gain, round 1 of 1: processes", "nobody waits in silence"
        [turns], [split] = found["sequential"], found["processes"]
        assert turns.prefill_alone > 0 and turns.decode_alone > 0
        assert turns.prefill > 0 and turns.decode == 0  # prompts always wait, and in turns prefill goes first
        assert split.prefill > 0 and split.decode > 0
        assert engine.mode == "sequential"

    def test_prompts_are_prefilled_one_by_one_with_more_of_them_than_run_ahead(self, engine: Engine) -> None:
        """All in one batch would leave none to run ahead with: a GPU would wait, and its rate alone be too low."""
        began = time.perf_counter()
        measure_overlap(engine, ["processes"], 64, 2, 32, seconds=0.2, repeats=1)
        spans = [span for span in engine.timeline(began).spans if span.prefill_tokens > 32]
        assert len(spans) > 4 and {span.prefill_tokens for span in spans} == {64}
        assert GraphRunner.depth < WAITING

    def test_a_lane_that_fails_is_an_error_and_no_gain(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def submit(self: InlineLane, batch: Batch) -> None:
            raise LaneError("out of memory")

        monkeypatch.setattr(InlineLane, "submit", submit)
        with pytest.raises(LaneError, match="out of memory"):
            measure_overlap(engine, ["chunked"], 64, 2, 32, seconds=0.1, repeats=1)
        monkeypatch.undo()
        assert engine.kv_use == 0
        engine.set_mode("sequential")

    def test_the_window_begins_when_all_decode(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """In two lanes the first request decodes while the others' prompts are still read."""
        seen: list[tuple[Timeline, float]] = []
        monkeypatch.setattr(overlap_module, "rate", lambda timeline, phase, start, end: seen.append((timeline, start)))
        engine.set_mode("processes")
        overlap_module._run(engine, "decode", overlap_module.Shape(64, 6, 64), 0.1)
        timeline, start = seen[0]
        inside = [span for span in timeline.spans if span.start >= start and span.end <= start + 0.1]
        assert len(inside) > 2 and {(span.phase, span.decode_tokens) for span in inside} == {("decode", 6)}
        engine.set_mode("sequential")

    def test_the_limit_is_what_each_phase_reaches_alone_on_its_lane(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rates = {("sequential", "prefill"): 800.0, ("sequential", "decode"): 40.0}
        rates |= {("processes", "prefill"): 400.0, ("processes", "decode"): 32.0}

        def run(engine: Engine, load: str, *_: Any) -> tuple[float, float]:
            return rates[engine.mode, "prefill"], rates[engine.mode, "decode"]

        monkeypatch.setattr("splitwiser_lab.measure.overlap._run", run)
        assert measure_limit(engine, "processes", repeats=2) == [pytest.approx(0.5 + 0.8)] * 2
        assert engine.mode == "sequential"


class TestPeers:
    def test_all_write_the_same_tokens(self, engine: Engine) -> None:
        prompts = prompts_of(16, 16, 16)
        peers = [OursPeer(engine), GeneratePeer(tiny("llama")), GenerateBatchPeer(tiny("llama"))]
        written = [peer.run(prompts, 6) for peer in peers]
        for peer in peers:
            peer.close()
        assert pickle.dumps(tiny("llama")), "nothing is left on the model that other processes could not take"
        assert all(seconds > 0 for seconds, _ in written)
        assert written[0][1] == written[1][1] == written[2][1]
        assert [len(tokens) for tokens in written[0][1]] == [6, 6, 6]

    def test_generate_batch_keeps_its_manager_and_finds_no_prompt_of_an_earlier_round(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, prompts = build("llama"), prompts_of(64, 64, 64)
        made: list[int] = []
        generate_batch = model.generate_batch
        monkeypatch.setattr(
            model, "generate_batch", lambda *a, **more: made.append(len(a[0])) or generate_batch(*a, **more)
        )
        peer = GenerateBatchPeer(model)
        wanted = [OursPeer(engine).run(prompts, new)[1] for new in (2, 6)]
        assert peer.run(prompts, 2)[1] == wanted[0] and peer.run(prompts, 2)[1] == wanted[0]
        assert made == [3], "a second call like the first makes nothing"
        assert peer.run(prompts, 6)[1] == wanted[1] and made == [3, 3], "longer requests need a larger cache"
        manager = model._cached_continuous_batching_manager
        assert peer.run(prompts[:2], 2)[1] == wanted[0][:2] and len(made) == 2
        assert (
            model._cached_continuous_batching_manager is manager
            and not manager.batch_processor.cache.use_prefix_sharing
        )
        assert not manager.is_running(), "between calls the model is free for others"
        peer.close()
        assert not hasattr(model, "_cached_continuous_batching_manager")
        assert peer.run(prompts, 2)[1] == wanted[0], "asking again works"
        peer.close()


class TestBench:
    def test_ratios_are_taken_round_by_round(self) -> None:
        figure = Figure("f", "tok/s", [10.0, 30.0, 20.0], {"HF generate": [5.0, 10.0, 20.0]}, {"HF generate": 1.3})
        assert figure.ratios("HF generate") == [2.0, 3.0, 1.0]
        assert figure.to_dict()["peers"]["HF generate"]["ratio"] == 2.0

    def test_the_whole_bench_on_a_tiny_model(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        build("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "model")
        monkeypatch.setattr("splitwiser_lab.measure.peers.find_vllm", lambda python: None)
        for name in ("measure_overlap", "measure_limit"):
            short = functools.partial(getattr(bench_module, name), seconds=0.2)
            monkeypatch.setattr(bench_module, name, short)
        found = bench(str(tmp_path / "model"), repeats=1, kv_tokens=8192)
        names = [figure.name for figure in found.figures]
        assert any("decode" in name for name in names) and any("prefill" in name for name in names)
        assert any("overlap" in name for name in names) and any("its limit" in name for name in names)
        assert sum("overhead" in name for name in names) == 2
        assert "not installed" in found.missing["vLLM"]
        assert all(agreement.startswith("8 of 8") for agreement in found.tokens.values())
        data = json.loads(found.to_json(tmp_path / "bench.json"))
        assert data["schema"].startswith("splitwiser-lab/bench") and len(data["runs"]) == 4
        assert all(run["overlap_gain"] > 0 for run in data["runs"])
        console = Console(width=150)
        with console.capture() as capture:
            console.print(found.table())
        assert "vLLM is missing" in capture.get()
        assert {(part["load"], part["peer"]) for part in data["breakdowns"]} == {
            (load, peer)
            for load in ("prefill, 512 tokens", "decode, batch 8, context 128")
            for peer in ("splitwiser_lab", "HF generate")
        }
        assert all(part["ms"]["matrix products"] > 0 and part["longest_ms"] for part in data["breakdowns"])
