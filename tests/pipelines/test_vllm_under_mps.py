"""Engines as clients of an MPS daemon: a fake daemon and fake engines, since what is tested is the surroundings."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_vllm import continued
from tiny_models import prompts_of
from typer.testing import CliRunner
from vllm_models import fake_python, tiny_for_vllm

from splitwiser_lab import LaneError, VllmPipeline, Workload
from splitwiser_lab.cli import app
from splitwiser_lab.lanes.mps import MpsDaemon
from splitwiser_lab.lanes.mps_guard import CONTROL
from splitwiser_lab.pipelines.document import Reproduction
from splitwiser_lab.pipelines.vllm.team import Team

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="MPS is Linux's"),
    pytest.mark.usefixtures("no_process_left"),
]
PROMPTS = prompts_of(30, 20, 10)
FAKE = Path(__file__).parents[1] / "lanes" / "fake_mps_control.py"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MpsDaemon:
    """A daemon whose control program is the fake, and a CPU that is taken for a GPU that has MPS."""
    program = tmp_path / CONTROL
    program.write_text(f"#!{sys.executable}\n{FAKE.read_text()}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    made = MpsDaemon()
    monkeypatch.setattr("splitwiser_lab.pipelines.vllm.placement.why_not", lambda kind, device: None)
    monkeypatch.setattr("splitwiser_lab.pipelines.vllm.team.index_of", lambda device: 0)
    monkeypatch.setattr("splitwiser_lab.pipelines.vllm.team.daemon_for", lambda index: made)
    return made


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[VllmPipeline]:
    tiny_for_vllm(tmp_path / "tiny")
    with VllmPipeline.from_pretrained(tmp_path / "tiny", "cpu", vllm_python=fake_python(tmp_path)) as made:
        yield made


def test_each_engine_has_its_share_and_the_daemon_ends_with_them(pipeline: VllmPipeline, daemon: MpsDaemon) -> None:
    pipeline.set_mode("split", mps=True, sm_shares=[75, 25])
    assert daemon.ended(), "nothing starts before the first run"
    assert pipeline.generate(PROMPTS, 5, ignore_eos=True).tokens == [continued(prompt, 5) for prompt in PROMPTS]
    around = {name: psutil.Process(pid).environ() for name, pid in pipeline.pids.items()}
    shares = {name: there["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for name, there in around.items()}
    assert shares == {"prefill": "75", "decode": "25"}
    assert len({there["CUDA_MPS_PIPE_DIRECTORY"] for there in around.values()}) == 1
    assert not daemon.ended()
    pipeline.set_mode("sequential")
    pipeline.generate(PROMPTS, 5)
    assert daemon.ended()


def test_a_share_that_is_refused_is_left_out_and_the_rest_goes_on(
    daemon: MpsDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Team, "_products", lambda self, role: {"share": role.sm_share} if role.sm_share else None)
    monkeypatch.setenv("FAKE_VLLM", "refuse")
    tiny_for_vllm(tmp_path / "tiny")
    words = ["reproduce", "--pipeline", "vllm", "--model", str(tmp_path / "tiny"), "--device", "cpu", "--no-engine"]
    words += ["--vllm", fake_python(tmp_path), "--input", "20", "--output", "4,5", "--requests", "4", "--repeats", "2"]
    words += ["--mode", "replicas,split", "--sm-shares", "75,25", "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code != 0
    found = Reproduction.load(tmp_path / "r.json")
    assert [(row.name, row.output, row.repeats) for row in found.rows] == [
        (name, output, 2) for output in (4, 5) for name in ("generate", "sequential")
    ]
    ways = ["replicas × 2, MPS 75/25 %", "split × 2, shared, MPS 75/25 %", "split × 2, example, MPS 75/25 %"]
    assert list(found.skipped) == ways and not found.left_out
    assert all("did not start: under MPS with 75 %" in why for why in found.skipped.values())
    assert "left out: replicas × 2, MPS 75/25 %" in result.stdout
    assert daemon.ended()


def test_a_daemon_that_is_killed_ends_the_run_and_not_the_next(
    pipeline: VllmPipeline, daemon: MpsDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.set_mode("replicas", 2, mps=True)
    monkeypatch.setenv("FAKE_VLLM", "slow")
    pipeline.start(Workload.closed(PROMPTS, output_tokens=200))
    pids = pipeline.pids
    assert daemon.pid is not None
    killer = threading.Timer(1.0, psutil.Process(daemon.pid).children()[0].kill)
    killer.start()
    with pytest.raises(LaneError, match="because the MPS daemon ended or was killed"):
        pipeline.generate(PROMPTS, 200, ignore_eos=True)
    killer.join()
    assert not any(psutil.pid_exists(pid) for pid in pids.values())
    monkeypatch.delenv("FAKE_VLLM")
    assert pipeline.generate(PROMPTS, 5, ignore_eos=True).tokens == [continued(prompt, 5) for prompt in PROMPTS]


def test_a_daemon_that_does_not_start_leaves_nothing(
    pipeline: VllmPipeline, daemon: MpsDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "refuse")
    pipeline.set_mode("replicas", 2, mps=True)
    with pytest.raises(LaneError, match="did not start"):
        pipeline.generate(PROMPTS, 5)
    assert not pipeline.pids and daemon.ended()
