"""What the vLLM pipeline refuses before any engine starts, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_models import fake_python, tiny_for_vllm

from splitwiser_lab import ModeError, ModelError, RequestError
from splitwiser_lab.pipelines.vllm.pipeline import VllmPipeline
from splitwiser_lab.pipelines.vllm.process import check_version

pytestmark = pytest.mark.usefixtures("no_process_left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    tiny_for_vllm(made)
    return made


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fake_python(tmp_path_factory.mktemp("python"))


@pytest.fixture
def pipeline(folder: Path, python: str) -> Iterator[VllmPipeline]:
    with VllmPipeline.from_pretrained(folder, "cpu", vllm_python=python) as made:
        yield made
    assert not made.pids


def test_versions() -> None:
    for known in ("0.24.0", "0.32.0+cpu", "0.30.1rc1"):
        check_version(known, "python")
    for unknown in ("0.23.9", "0.33.0", "1.0", "strange"):
        with pytest.raises(ModeError, match=unknown):
            check_version(unknown, "python")


def test_no_vllm_at_all_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitwiser_lab.pipelines.vllm.process.find_vllm", lambda given: given)
    with pytest.raises(ModeError, match=r"make vllm.*--vllm"):
        VllmPipeline.from_pretrained(folder, "cpu")
    with (
        pytest.raises(ModeError, match=r"'/no/such/python' cannot be started"),
        VllmPipeline.from_pretrained(folder, "cpu", vllm_python="/no/such/python") as made,
    ):
        made.generate([[1, 2, 3]], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "threads"}, "no mode 'threads': use sequential, replicas, split"),
        ({"mode": "sequential", "engines": 2}, "sequential is one engine, not 2"),
        ({"mode": "split", "engines": 1}, "split needs 2 engines"),
        ({"mode": "replicas", "engines": 0}, "engines=0"),
        ({"mode": "replicas", "connector": "shared"}, "only 'split' hands anything over"),
        ({"mode": "split", "connector": "nixl"}, "by example or shared"),
        ({"mode": "split", "chunk_tokens": 64}, "handed over whole"),
        ({"mode": "sequential", "chunk_tokens": 3}, "16 tokens or more"),
        ({"mode": "split", "sm_shares": [75, 25]}, "add mps=True"),
        ({"mode": "split", "mps": True, "sm_shares": [75]}, "give 2 percentages"),
        ({"mode": "split", "mps": True}, "mps=True cannot run on cpu: .*this device is a CPU"),
    ],
)
def test_placements_that_cannot_be(pipeline: VllmPipeline, options: dict, message: str) -> None:
    before = pipeline.placement
    with pytest.raises(ModeError, match=message):
        pipeline.set_mode(**options)
    assert pipeline.placement == before


def test_requests_and_models_that_cannot_be_served(pipeline: VllmPipeline, python: str, tmp_path: Path) -> None:
    for prompts, new, message in (([], 3, "no prompts"), ([[]], 3, "empty"), ([[1] * 250], 10, "model's context")):
        with pytest.raises(RequestError, match=message):
            pipeline.generate(prompts, new)
    with pytest.raises(ModelError, match="save it with save_pretrained"):
        VllmPipeline.from_pretrained({}, "cpu", vllm_python=python)  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(ModelError, match=r"encoder-decoder \(t5\)"):
        VllmPipeline.from_pretrained(tmp_path, "cpu", vllm_python=python)
