"""Mode auto on a CPU: the same tokens whatever it chooses, choices by what it measured, reasons in sentences."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeEngine
from tiny_models import expected, prompts_of

import splitwiser_lab as sl
from splitwiser_lab.engine import auto as auto_module
from splitwiser_lab.engine import choices
from splitwiser_lab.engine.choices import candidates
from splitwiser_lab.engine.controller import Candidate, Decision
from splitwiser_lab.engine.rates import Lengths
from splitwiser_lab.engine.request import Request, Sampling

PROMPTS = prompts_of(70, 20, 5, 90, 33, 64, 12, 50)


def restless(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A controller that takes the next candidate each time it is asked; gives what it chose."""
    chosen: list[str] = []

    def decide(found: Any, rates: Any, load: Any, current: Any, limit: Any) -> Decision:
        following = found[(found.index(current) + 1) % len(found)]
        chosen.append(following.label)
        return Decision(following, "restless", load)

    monkeypatch.setattr(auto_module, "decide", decide)
    monkeypatch.setattr(auto_module, "_LOOK_SECONDS", 0.002)  # some steps between two changes
    for wait in ("_DRY_SECONDS", "_DWELL_SECONDS"):
        monkeypatch.setattr(auto_module, wait, 0.0)
    return chosen


def test_tokens_are_the_reference_whatever_it_changes_to(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    restless(monkeypatch)
    engine = make_engine("llama", "auto")
    for _ in range(3):
        result = engine.generate(PROMPTS, 24)
        assert result.tokens == expected("llama", PROMPTS, 24)
        assert sum(span.prefill_tokens for span in result.timeline.spans) == sum(map(len, PROMPTS)), "nothing twice"
    runs = {change.runs.split()[0] for change in engine.timeline().modes}
    assert {"sequential", "chunked", "processes"} <= runs and engine.mode == "auto"
    assert all(change.mode == "auto" for change in engine.timeline().modes)


def test_a_cold_start_takes_turns_and_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", "auto")
    assert "No request came yet" in engine.explain()
    engine.generate([PROMPTS[0]], 2)
    assert engine.timeline().modes[-1].runs == "sequential" and "auto runs sequential" in engine.explain()


def test_it_learns_and_explains_with_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", "auto", itl_limit_ms=200)
    work = sl.Workload.poisson(150.0, requests=40, prompt_tokens=60, output_tokens=30)
    result = engine.serve(work)
    assert result.metrics.completed == 40
    said = engine.explain()
    assert ("gaps within 200 ms" in said and "tok/s" in said) or "only decode has work" in said
    assert "partitioned" not in said, "what needs a GPU is no choice on a CPU, and nobody expects it"


def test_another_mode_ends_it_and_it_can_come_back(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = restless(monkeypatch)
    engine = make_engine("llama", "auto")
    engine.generate(PROMPTS[:3], 4)
    engine.set_mode("chunked")
    asked = len(chosen)
    engine.generate(PROMPTS[:3], 4)
    assert engine.mode == "chunked" and len(chosen) == asked, "nobody asks the controller any more"
    assert "asked for" in engine.explain()
    engine.set_mode("auto")
    assert engine.generate(PROMPTS[:3], 4).tokens == expected("llama", PROMPTS[:3], 4) and len(chosen) > asked


def test_lanes_that_do_not_start_are_left_out_and_named(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("llama")
    real = engine._prepare

    def prepare(mode: str, options: dict[str, Any]) -> Any:
        if mode == "processes":
            raise sl.LaneError("its process did not start.")
        return real(mode, options)

    monkeypatch.setattr(engine, "_prepare", prepare)
    engine.set_mode("auto")
    assert "processes is no choice: its process did not start." in engine.explain()
    assert engine.generate(PROMPTS[:2], 4).tokens == expected("llama", PROMPTS[:2], 4)


def test_the_choices_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "cores", lambda: [0, 1])
    found, left_out = candidates("cpu", 128)
    chunks = [f"chunked (chunk_tokens={tokens})" for tokens in (64, 128, 192, 256, 512)]
    assert [c.label for c in found] == ["sequential", *chunks, "processes"] and not left_out
    monkeypatch.setattr(choices, "cores", lambda: [0])
    found, left_out = candidates("cpu", 128)
    assert len(found) == 6 and "one core" in left_out["processes"]


def modes(found: list[Candidate]) -> set[str]:
    return {candidate.mode for candidate in found}


def test_the_choices_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that runs here; other processes only where they run already, or are asked for."""
    asked = []
    monkeypatch.setattr(choices, "find_mode", lambda mode, device: asked.append(mode))
    monkeypatch.setattr(choices, "splits", lambda device, parts: [(32, 0.24), (64, 0.48)])
    found, left_out = candidates("cuda", 512)
    assert modes(found) == {"sequential", "chunked", "partitioned", "streams"} and found[0].kind == "turns"
    assert set(left_out) == {"mps", "processes"} == {"mps", "processes"} - set(asked), "a daemon is not even tried"
    assert "with_processes=1" in left_out["mps"]
    assert "processes" in modes(candidates("cuda", 512, {"process"})[0])
    assert {"mps", "processes"} <= modes(candidates("cuda", 512, with_processes=True)[0])
    divides = {candidate.mode: candidate.divides for candidate in found}
    assert divides["partitioned"] and not divides["streams"]


def test_what_a_gpu_cannot_do_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_mode(mode: str, device: str) -> None:
        if mode == "partitioned":
            raise sl.ModeError("the driver knows no green contexts.")

    monkeypatch.setattr(choices, "find_mode", find_mode)
    found, left_out = candidates("cuda", 512)
    assert "streams" in modes(found) and left_out["partitioned"] == "the driver knows no green contexts"


def test_lengths_are_learned_from_requests_that_ended() -> None:
    lengths = Lengths()
    first, second = (Request(n, [1], Sampling(max_new_tokens=500), 0.0) for n in range(2))
    lengths.look([first, second])
    assert lengths.left(second) == 500, "nothing is known yet"
    first.output += [1] * 40
    first.finish("stop", 1.0)
    second.output += [1] * 10
    lengths.look([second])
    assert lengths.left(second) == 30
    second.output += [1] * 100
    assert lengths.left(second) == 390, "the one that ended after 40 says nothing of one that has written 110"


def test_its_option_is_checked(make_engine: MakeEngine) -> None:
    with pytest.raises(sl.ModeError, match="itl_limit_ms=0"):
        make_engine("llama", "auto", itl_limit_ms=0)
