"""A sweep measured in several calls and joined; and how differences of tokens in it are judged."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build
from typer.testing import CliRunner

import splitwiser_lab as sl
from splitwiser_lab.cli import app
from splitwiser_lab.measure.gpu_suite.job import summary
from splitwiser_lab.measure.gpu_suite.join import join
from splitwiser_lab.measure.gpu_suite.sweep import longest_idle
from splitwiser_lab.measure.gpu_suite.token_gaps import Differences, add_token_rows
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.timeline import RequestRecord, Span, Timeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("suite") / "tiny-llama"
    build("llama", max_position_embeddings=4096).save_pretrained(folder)
    return str(folder)


WORDS = ("bench", "--suite", "gpu", "--sections", "sweep", "--device", "cpu", "--repeats", "1", "--seconds", "60")


def call(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def parts(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    paths = [folder / name for name in ("a.json", "b.json", "c.json")]
    base = [*WORDS, "--shapes", model]
    call(*base, "--modes", "chunked", "--rates", "0.5", "--json", str(paths[0]))
    rows = json.loads(paths[0].read_text())["sections"]["sweep"]["tiny-llama"]["rows"]
    assert {row["mode"] for row in rows if row["part"] == "rate"} == {"sequential", "chunked"}
    capacity = str(fmean(rows[0]["request_throughput"]["samples"]))
    same = ["--capacity", capacity, "--modes", "auto:itl_limit_ms=50"]
    call(*base, *same, "--rates", "0.5,1.0", "--json", str(paths[1]))
    call(*base, "--capacity", "1", "--modes", "chunked", "--rates", "0.5", "--json", str(paths[2]))
    return paths


def test_parts_are_joined_sample_by_sample(parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "whole.json"
    said = call("bench", "--join", str(parts[0]), "--join", str(parts[1]), "--json", str(out))
    assert "goodput: TTFT within 500 ms" in " ".join(said.split()) and "figures to reach" in said
    found = json.loads(out.read_text())
    rows = {(r["fraction"], r["mode"]): r for r in found["sections"]["sweep"]["tiny-llama"]["rows"] if "rate" in r}
    assert set(rows) == {
        (0.5, "sequential"), (0.5, "chunked"), (0.5, "auto:itl_limit_ms=50"),
        (1.0, "sequential"), (1.0, "auto:itl_limit_ms=50"),
    }  # fmt: skip
    assert len(rows[0.5, "sequential"]["goodput"]["samples"]) == 2
    assert len(rows[0.5, "chunked"]["goodput"]["samples"]) == 1
    assert [part["file"] for part in found["joined"]] == ["a.json", "b.json"] and found["verdicts"]


def test_phases_and_limits_of_two_calls_are_joined(parts: list[Path], tmp_path: Path) -> None:
    def part(name: str, ms: float, limit: dict[str, Any] | None) -> Path:
        case = {"phase": "prefill", "batch": 1, "tokens": 64, "lengths": "equal"}
        rate = {"rate": summary([1 / ms]), "share": summary([0.5]), "ms": summary([ms])}
        times = {f"{kind}_ms": summary([ms]) for kind in ("products", "attention", "rest", "undisturbed")}
        rows = {
            "efficiency": {**case, **rate, "unit": "FLOP/s"},
            "kernels": {**case, **times, "ms": summary([ms]), "idle_ms": None, "longest_ms": {"gemm": ms}},
            "overlap": {"load": "l", "mode": "mps", "gain": summary([ms]), "limit": limit},
        }
        document = json.loads(parts[0].read_text())
        document["sections"] = {s: {"tiny-llama": {"rows": [row], "left_out": []}} for s, row in rows.items()}
        (tmp_path / name).write_text(json.dumps(document))
        return tmp_path / name

    joined = join([part("a", 2.0, None), part("b", 4.0, summary([1.3])), part("c", 6.0, None)]).document["sections"]
    [phase], [times], [overlap] = (joined[s]["tiny-llama"]["rows"] for s in ("efficiency", "kernels", "overlap"))
    assert phase["ms"]["samples"] == times["products_ms"]["samples"] == overlap["gain"]["samples"] == [2.0, 4.0, 6.0]
    assert phase["rate"]["samples"] == [1 / 2, 1 / 4, 1 / 6] and overlap["limit"]["samples"] == [1.3]


def test_other_rates_are_refused(parts: list[Path]) -> None:
    with pytest.raises(sl.WorkloadError, match=r"rate is .* --capacity"):
        join([parts[0], parts[2]])


@pytest.mark.parametrize("name", ["commit", "hardware", "limits", "plan"])
def test_another_origin_is_refused(parts: list[Path], tmp_path: Path, name: str) -> None:
    other = json.loads(parts[1].read_text())
    other[name] = {**other[name], "name": "another"} if isinstance(other[name], dict) else "another"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(sl.WorkloadError, match=f"differ in {name}"):
        join([parts[0], tmp_path / "other.json"])


def test_what_is_no_bench_is_refused(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(sl.WorkloadError, match="was not written by"):
        join([parts[0], tmp_path / "x.json"])
    with pytest.raises(sl.WorkloadError, match="two or more"):
        join(parts[:1])


def test_a_difference_is_held_against_what_the_dtype_tells_apart() -> None:
    """In bfloat16: the reference's own second choice, and a token that nobody would pick."""
    theirs = Reference(build("llama").to(torch.bfloat16))
    prompt = list(range(5, 25))
    tokens = theirs.tokens(prompt, 6, ignore_eos=True)
    least = int(theirs.choices(prompt, tokens).exact[2].argmin())
    rows: list[dict[str, Any]] = []
    job: Any = SimpleNamespace(
        time_for=lambda what, seconds: True,
        trying=lambda what: contextlib.nullcontext(),
        report=lambda message: None,
        shape="tiny",
        engine=SimpleNamespace(model=SimpleNamespace(reference=lambda: theirs.model)),
        add=lambda **row: rows.append(row),
    )
    noted = {"chunked": Differences(), "streams": Differences()}
    wrong: Any = SimpleNamespace(prompt=prompt, output=[*tokens[:2], least, *tokens[3:]], error=None)
    same: Any = SimpleNamespace(prompt=prompt, output=tokens, error=None)
    failed: Any = SimpleNamespace(prompt=prompt, output=[], error=RuntimeError("counted elsewhere"))
    assert noted["chunked"].compare([wrong, failed, same], [tokens] * 3) == 0.5
    assert noted["streams"].compare([same], [tokens]) == 1.0
    add_token_rows(job, noted)
    assert (rows[0]["requests"], rows[0]["differ"], rows[0]["looked_at"]) == (2, 1, 1)
    assert rows[0]["explained"] == "0 of 1" and rows[0]["largest_gap"] > rows[0]["resolution_there"] > 0
    assert (rows[1]["differ"], rows[1]["explained"]) == (0, "1 of 1"), "a text like sequential's is read, too"
    assert rows[1]["largest_gap"] <= rows[1]["resolution_there"]


def test_every_token_of_a_text_is_read() -> None:
    """The one that is least to be explained is told, wherever it stands; in float32 only the model's own will do."""
    theirs = Reference(build("llama"))
    prompt = list(range(5, 25))
    tokens = theirs.tokens(prompt, 8, ignore_eos=True)
    assert theirs.worst_choice(prompt, tokens).identical
    for place in (0, 4, 7):
        logits = theirs.choices(prompt, tokens).exact[place]
        second = int(logits.topk(2).indices[1])
        found = theirs.worst_choice(prompt, [*tokens[:place], second])
        assert (found.first_difference, found.explained) == (place, False)
        assert found.gap == pytest.approx(float(logits.max() - logits[second]), rel=1e-4)


def test_an_idle_device_beside_work_is_the_hosts() -> None:
    def span(lane: str, start: float, end: float) -> Span:
        return Span(lane, "decode", start, end, 0, 1, 1, "streams")

    spans = (span("decode", 0.0, 1.0), span("prefill", 0.5, 2.0), span("decode", 2.3, 3.0), span("decode", 9.0, 9.5))
    working = RequestRecord(0, 4, 0.0, (1.0, 3.0), finished=3.0, finish_reason="length")
    late = RequestRecord(1, 4, 8.9, (9.5,), finished=9.5, finish_reason="length")
    assert longest_idle(Timeline(spans, (working, late))) == pytest.approx(0.3), "before 9.0 one waited for 0.1"
    assert longest_idle(Timeline(spans, (working, replace(late, arrival=2.9)))) == pytest.approx(6.0)
    assert longest_idle(Timeline(spans[2:], (working,))) == pytest.approx(2.3), "before the first batch, too"
    assert longest_idle(Timeline((), (working,))) == 0.0


def test_a_reference_has_its_very_weights_again() -> None:
    """To judge half precision it computes in float32 for a while; other processes may share the weights."""
    theirs = Reference(build("llama").to(torch.bfloat16))
    before = [(weight.data_ptr(), weight.dtype) for weight in theirs.model.parameters()]
    assert theirs.choices([5, 6, 7], [8, 9]).resolution.min() > 0, "bfloat16 rounds"
    assert [(weight.data_ptr(), weight.dtype) for weight in theirs.model.parameters()] == before
