"""The life of an MPS daemon, with a fake one: started and ended by us, and nothing left whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import expected, prompts_of, tiny

from splitwiser_lab.errors import LaneError
from splitwiser_lab.lanes import mps_guard
from splitwiser_lab.lanes.mps import MpsDaemon, MpsShare
from splitwiser_lab.lanes.mps_guard import CONTROL, users_of
from splitwiser_lab.lanes.process import ProcessLane
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.loading import load
from splitwiser_lab.model.transformer import Transformer

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="MPS is Linux's"),
    pytest.mark.usefixtures("no_process_left"),
]
(PROMPT,) = prompts_of(30)


@pytest.fixture(autouse=True)
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fake, first on the PATH."""
    program = tmp_path / "bin" / CONTROL
    program.parent.mkdir()
    source = Path(__file__).with_name("fake_mps_control.py").read_text()
    program.write_text(f"#!{sys.executable}\n{source}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


@pytest.fixture
def daemon() -> Iterator[MpsDaemon]:
    daemon = MpsDaemon()
    yield daemon
    while daemon._holders:
        daemon.release()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def pid_in(folder: str, name: str) -> int:
    assert eventually(lambda: (Path(folder) / name).exists() and (Path(folder) / name).read_text() != "")
    return int((Path(folder) / name).read_text())


def test_it_runs_while_somebody_holds_it(daemon: MpsDaemon) -> None:
    assert daemon.ended() and daemon.pid is None
    daemon.hold()
    folder, guard = daemon._folder, daemon.pid
    daemon.hold()
    assert not daemon.ended() and daemon.pid == guard
    daemon.release()
    assert not daemon.ended(), "one holder is left"
    server = pid_in(folder, "server.pid")
    daemon.release()
    assert daemon.ended() and daemon.pid is None
    assert not psutil.pid_exists(server) and not users_of(folder) and not os.path.exists(folder)
    daemon.hold()
    assert daemon._folder not in ("", folder), "and again, in a folder of its own"


def test_the_environment_of_clients_and_of_the_daemon() -> None:
    daemon = MpsDaemon("GPU-7")
    around = MpsShare(daemon, 30).enter()
    folder = daemon._folder
    assert around == {
        "CUDA_VISIBLE_DEVICES": "GPU-7",
        "CUDA_MPS_PIPE_DIRECTORY": folder,
        "CUDA_MPS_LOG_DIRECTORY": folder,
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30",
    }
    there = psutil.Process(pid_in(folder, "control.pid")).environ()
    assert there["CUDA_VISIBLE_DEVICES"] == "GPU-7" and there["CUDA_MPS_PIPE_DIRECTORY"] == folder
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in there
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ, "this process is no client"
    daemon.release()


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("refuse", "ended at once with code 3: An instance of this daemon is already running"),
        pytest.param("mute", "did not answer", marks=pytest.mark.slow),
    ],
)
def test_a_daemon_that_does_not_start(
    daemon: MpsDaemon, monkeypatch: pytest.MonkeyPatch, behaviour: str, said: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_MPS", behaviour)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(LaneError, match=f"the MPS daemon did not start: .*{said}"):
        daemon.hold()
    assert daemon.ended() and daemon.pid is None
    assert not list(tmp_path.glob("splitwiser_mps_*"))
    monkeypatch.setenv("FAKE_MPS", "")
    daemon.hold()
    assert not daemon.ended(), "asking again after an error works"


def test_without_the_program(daemon: MpsDaemon, control: Path) -> None:
    control.unlink()
    with pytest.raises(LaneError, match=f"the MPS daemon did not start: {CONTROL} could not be started"):
        daemon.hold()


@pytest.mark.parametrize("victim", ["control.pid", "server.pid", "guard"])
def test_whoever_is_killed_all_of_it_goes(daemon: MpsDaemon, victim: str) -> None:
    daemon.hold()
    folder = daemon._folder
    server = pid_in(folder, "server.pid")
    if victim == "server.pid":
        time.sleep(0.3)  # the guard has seen the server
    pid = daemon.pid if victim == "guard" else pid_in(folder, victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert daemon.ended(wait=5.0), "the lifeline closes"
    daemon.hold()  # tidies up what the killed one left
    assert not (running if victim == "guard" else psutil.pid_exists)(server), "where the guard lives, it also reaps"
    assert not users_of(folder) and not os.path.exists(folder)
    assert daemon._folder != folder and not daemon.ended()
    daemon.release()


def test_a_daemon_that_ignores_quit_is_killed(daemon: MpsDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "stubborn")
    daemon.hold()
    folder = daemon._folder
    pids = [pid_in(folder, name) for name in ("control.pid", "server.pid")]
    daemon.release()
    assert not any(psutil.pid_exists(pid) for pid in pids) and not os.path.exists(folder)


PARENT = """
import json, os, time
from splitwiser_lab.lanes.mps import MpsDaemon
daemon = MpsDaemon()
daemon.hold()
print(json.dumps([daemon.pid, daemon._folder]), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_parent_that_dies_takes_it_along(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    guard, folder = json.loads(parent.stdout.readline())
    pids = [guard, pid_in(folder, "control.pid"), pid_in(folder, "server.pid")]
    parent.send_signal(number)
    parent.wait()
    assert eventually(lambda: not any(map(running, pids))), "guard, daemon or server is left"
    assert eventually(lambda: not os.path.exists(folder))


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # where nobody reaps orphans
    except psutil.NoSuchProcess:
        return False


def test_an_interrupt_is_not_for_the_guard(daemon: MpsDaemon) -> None:
    daemon.hold()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(daemon.pid or 0, number)
    time.sleep(0.3)
    assert not daemon.ended()


# -- lanes under it


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    weights = load(tiny("llama"), "cpu", torch.float32).weights
    return Transformer(weights, KVPool(weights.config, torch.float32, "cpu", 64, 8))


def prefill() -> Batch:
    return Batch([], [Sequence(PROMPT, 0, [9, 2, 30, 11, 4], GREEDY)])


def test_two_lanes_share_a_daemon(daemon: MpsDaemon, transformer: Transformer) -> None:
    lanes = [ProcessLane(name, transformer, MpsShare(daemon, share)) for name, share in (("a", 75), ("b", 25))]
    for lane, share in zip(lanes, ("75", "25"), strict=True):
        lane.start()
        around = psutil.Process(lane.pid).environ()
        assert around["CUDA_MPS_PIPE_DIRECTORY"] == daemon._folder
        assert around["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == share
        assert lane.submit(prefill()).result().tokens == expected("llama", [PROMPT], 1)[0]
    lanes[0].close()
    assert not daemon.ended()
    lanes[1].close()
    assert daemon.ended()


def test_a_killed_daemon_is_the_lanes_error_and_the_next_batch_gets_a_new_one(
    daemon: MpsDaemon, transformer: Transformer
) -> None:
    lanes = [ProcessLane(name, transformer, MpsShare(daemon, 50)) for name in ("a", "b")]
    for lane in lanes:
        lane.start()
    folder, first = daemon._folder, lanes[0].pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)  # so that its batch is surely under way
    ticket = lanes[0].submit(prefill())
    os.kill(pid_in(folder, "control.pid"), signal.SIGKILL)
    with pytest.raises(LaneError, match=r"lane 'a': its process .*because the MPS daemon ended or was killed"):
        ticket.result()
    for lane in lanes:  # the other was idle: it does not even notice
        assert lane.submit(prefill()).result().tokens == expected("llama", [PROMPT], 1)[0]
    assert not users_of(folder) and not os.path.exists(folder)
    for lane in lanes:
        lane.close()
    assert daemon.ended()


def test_a_lane_that_is_killed_leaves_the_daemon_to_the_other(daemon: MpsDaemon, transformer: Transformer) -> None:
    lanes = [ProcessLane(name, transformer, MpsShare(daemon, 50)) for name in ("a", "b")]
    for lane in lanes:
        lane.start()
    guard = daemon.pid
    os.kill(lanes[0].pid or 0, signal.SIGKILL)
    lanes[0]._child._process.wait(10)  # type: ignore[union-attr]
    for lane in lanes:
        assert lane.submit(prefill()).result().tokens == expected("llama", [PROMPT], 1)[0]
    assert daemon.pid == guard
    for lane in lanes:
        lane.close()
    assert daemon.ended()


def test_a_daemon_that_does_not_start_is_the_lanes_error(
    daemon: MpsDaemon, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPS", "refuse")
    lane = ProcessLane("a", transformer, MpsShare(daemon, 50))
    with pytest.raises(LaneError, match="did not start"):
        lane.start()
    assert lane.pid is None and daemon.ended() and daemon._holders == 0
    monkeypatch.setenv("FAKE_MPS", "")
    lane.start()
    lane.close()


def test_the_folder_of_a_long_tmpdir_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(mps_guard.tempfile, "tempdir", str(long))
    folder = mps_guard.Guard(0, 0)._folder
    os.rmdir(folder)
    assert len(folder) < 60
