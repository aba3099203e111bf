"""The pipeline's processes as clients of an MPS daemon: a fake one, since what is tested is the surroundings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
from pipeline_models import model_of
from tiny_models import expected, prompts_of

from splitwiser_lab import HuggingFacePipeline, LaneError
from splitwiser_lab.lanes.mps import MpsDaemon
from splitwiser_lab.lanes.mps_guard import CONTROL

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
    monkeypatch.setattr("splitwiser_lab.pipelines.placement.why_not", lambda kind, device: None)
    monkeypatch.setattr("splitwiser_lab.pipelines.team.index_of", lambda device: 0)
    monkeypatch.setattr("splitwiser_lab.pipelines.team.daemon_for", lambda index: made)
    return made


def test_each_process_has_its_share_and_the_daemon_ends_with_them(daemon: MpsDaemon) -> None:
    options = {"mode": "split", "mps": True, "sm_shares": [75, 25]}
    with HuggingFacePipeline.from_pretrained(model_of("llama"), "cpu", **options) as made:
        assert daemon.ended(), "nothing starts before the first run"
        assert made.generate(PROMPTS, 5, batch_size=1).tokens == expected("llama", PROMPTS, 5)
        around = {name: psutil.Process(pid).environ() for name, pid in made.pids.items()}
        shares = {name: there["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for name, there in around.items()}
        assert shares == {"prefill": "75", "decode": "25"}
        assert len({there["CUDA_MPS_PIPE_DIRECTORY"] for there in around.values()}) == 1
        assert not daemon.ended()
        made.set_mode("sequential")
        assert made.generate(PROMPTS, 5).tokens == expected("llama", PROMPTS, 5)
        assert daemon.ended()


def test_two_teams_share_a_daemon_until_the_last_ends(daemon: MpsDaemon) -> None:
    with HuggingFacePipeline.from_pretrained(model_of("llama"), "cpu", mode="replicas", mps=True) as made:
        made.generate(PROMPTS, 5)
        with made.beside("split", 2, mps=True) as other:
            assert other.generate(PROMPTS, 5).tokens == expected("llama", PROMPTS, 5)
            pids = [*made.pids.values(), *other.pids.values()]
            folders = {psutil.Process(pid).environ()["CUDA_MPS_PIPE_DIRECTORY"] for pid in pids}
            assert len(pids) == 4 and len(folders) == 1, "a GPU runs the clients of one server side by side"
        assert not daemon.ended()
        assert made.generate(PROMPTS, 5).tokens == expected("llama", PROMPTS, 5)
    assert daemon.ended()


def test_a_daemon_that_does_not_start_leaves_nothing(daemon: MpsDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "refuse")
    with HuggingFacePipeline.from_pretrained(model_of("llama"), "cpu", mode="replicas", mps=True) as made:
        with pytest.raises(LaneError, match="did not start"):
            made.generate(PROMPTS, 5)
        assert not made.pids and daemon.ended()
