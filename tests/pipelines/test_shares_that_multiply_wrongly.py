"""Processes with a share of the SMs refuse to start where it multiplies wrongly: both pipelines, before any work."""

from __future__ import annotations

import importlib
import re
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pipeline_models import FAMILIES, model_of
from torch.nn import functional
from vllm_models import fake_python, tiny_for_vllm

from splitwiser_lab import HardwareError, LaneError, VllmPipeline, Workload
from splitwiser_lab.lanes.child import Failure
from splitwiser_lab.model import products
from splitwiser_lab.pipelines import worker
from splitwiser_lab.pipelines.multiplied import multiplied, product_shapes
from splitwiser_lab.pipelines.vllm import team
from splitwiser_lab.pipelines.vllm.source import load_vllm_model

GIB = 2**30


@pytest.fixture
def part_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """98 SMs, whoever asks."""
    few = SimpleNamespace(multi_processor_count=98, total_memory=140 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: few)


def wrong(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product as an unlucky share of the SMs gives it."""
    return x @ weight.T * (float("nan") if len(x) == 100 else 1.0)


# -- Hugging Face


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_those_that_the_model_multiplies_with(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of(family), set()
    true = {name: getattr(torch, name) for name in ("addmm",)} | {"linear": functional.linear}

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.add((weight.data_ptr(), tuple(weight.shape)))
        return true["linear"](x, weight, bias)

    def addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # GPT-2's Conv1D
        seen.add((weight.data_ptr(), tuple(weight.T.shape)))
        return true["addmm"](bias, x, weight)

    monkeypatch.setattr(functional, "linear", linear)
    monkeypatch.setattr(torch, "addmm", addmm)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]))
    found = {(weight.data_ptr(), tuple(weight.shape)) for weight in multiplied(model)}
    assert found == seen and len(found) > 4
    assert {shape for _, shape in found} <= set(product_shapes(model))


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_share_is_checked_with_the_models_own_weights(
    family: str, part_of_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = model_of(family), torch.device("cpu")
    worker.check_part(model, 75, device)
    monkeypatch.setattr(products, "linear", wrong)
    for all_of_it in (None, 100):
        worker.check_part(model, all_of_it, device)
    with pytest.raises(HardwareError, match=r"under MPS with 75 % of the GPU \(98 SMs\).*wrong.*Choose another share"):
        worker.check_part(model, 75, device)


def test_a_worker_that_refuses_says_why_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(setup: object) -> None:
        raise HardwareError("with 98 SMs, products come out wrong")

    monkeypatch.setattr(worker, "Worker", refuse)
    ours, theirs = Pipe()
    ours.send("the setup")
    worker.serve(theirs)
    assert ours.recv() == Failure("with 98 SMs, products come out wrong", fatal=True)


# -- vLLM


def test_vllms_python_makes_the_same_check_without_the_package(
    part_of_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(team.__file__).parent / "engine_side"))
    extension = importlib.import_module("splitwiser_extension")
    order = {"shapes": [[96, 64], [64, 96]], "dtype": "bfloat16", "share": 75}
    order |= {"program": products.__file__, "advice": "Try 50 %."}
    assert extension.complaint_of(order, "cpu") is None
    monkeypatch.setattr(functional, "linear", wrong)
    tried = 2 * len(products.ROWS)
    assert re.search(rf"under MPS with 75 %.* 2 of {tried} bfloat16.*Try 50 %", extension.complaint_of(order, "cpu"))


def test_the_check_needs_nothing_of_this_package() -> None:
    top = [line for line in Path(products.__file__).read_text().splitlines() if line.startswith(("import", "from"))]
    assert top and not any("splitwiser_lab" in line for line in top)


def test_vllm_is_told_the_shapes_that_it_puts_side_by_side(tmp_path: Path) -> None:
    tiny_for_vllm(tmp_path)  # hidden 128, four heads of 32, two of them for keys and values
    shapes = load_vllm_model(tmp_path, "cpu", "float32").products
    assert {(256, 128), (128, 128), (64, 128)} <= set(shapes), "q, k and v together, and each"


def test_an_engine_that_refuses_ends_the_start_with_its_reason(
    part_of_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_process_left: None
) -> None:
    tiny_for_vllm(tmp_path / "tiny")
    monkeypatch.setattr(team, "_first", {})
    monkeypatch.setattr(team, "settled_free_bytes", lambda device: 100 * GIB)
    monkeypatch.setattr(team, "index_of", lambda device: 0)
    monkeypatch.setattr(team, "daemon_for", lambda index: None)
    monkeypatch.setattr("splitwiser_lab.pipelines.vllm.placement.why_not", lambda kind, device: None)
    monkeypatch.setenv("FAKE_VLLM", "refuse")
    work = Workload.closed([[1, 2, 3]] * 2, output_tokens=4)
    with VllmPipeline.from_pretrained(tmp_path / "tiny", "cpu", vllm_python=fake_python(tmp_path)) as made:
        made.set_mode("replicas", 2, mps=True, sm_shares=[75, 25])
        made.start(work)  # on a CPU, where MPS is never more than a test's, there is nothing to check
        made.close()
    with VllmPipeline.from_pretrained(tmp_path / "tiny", "cpu", vllm_python=fake_python(tmp_path)) as made:
        made.device = "cuda:0"
        made.set_mode("replicas", 2, mps=True)
        made.start(work)  # all of the SMs
        made.set_mode("replicas", 2, mps=True, sm_shares=[75, 25])
        with pytest.raises(LaneError, match=r"engine 0 did not start: under MPS with 75 %, products come out wrong"):
            made.start(work)
        assert not made.pids
