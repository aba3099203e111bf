"""An engine on a GPU is two processes, one of which computes: how both end, and what is told of the other's errors."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from fake_vllm import continued
from tiny_models import prompts_of
from vllm_models import fake_python, tiny_for_vllm

from splitwiser_lab import LaneError, VllmPipeline
from splitwiser_lab.pipelines.vllm import process
from splitwiser_lab.pipelines.vllm.process import engine_environment
from splitwiser_lab.pipelines.vllm.result import Progress, _Lane

SIDE = Path(process.PROGRAM).parent
PROMPTS = prompts_of(20, 10)


def test_an_engine_whose_core_is_killed_ends_itself() -> None:
    program = """
import multiprocessing, os, signal, sys, threading, time
import run_engine
run_engine._TELL_S = 0.1
core = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
core.start()
threading.Thread(target=run_engine.end_with_core, args=(multiprocessing.active_children(),), daemon=True).start()
os.kill(core.pid, signal.SIGKILL)
time.sleep(30)
"""
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], cwd=SIDE, timeout=60)
    assert ended.returncode == 1 and time.monotonic() - begun < 20, "it would wait for its core for ever"


def test_an_engine_in_one_process_has_no_core_to_wait_for() -> None:
    program = "import run_engine; run_engine.end_with_core([]); print('goes on')"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=SIDE, text=True) == "goes on\n"


def test_a_core_ends_with_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_for_vllm(tmp_path / "tiny")
    monkeypatch.setenv("FAKE_VLLM", "core")
    with VllmPipeline.from_pretrained(tmp_path / "tiny", "cpu", vllm_python=fake_python(tmp_path)) as made:
        assert made.generate(PROMPTS, 4, ignore_eos=True).tokens == [continued(prompt, 4) for prompt in PROMPTS]
        (engine,) = made.pids.values()
        (core,) = psutil.Process(engine).children()
    assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE


def test_what_a_core_logged_is_told_instead_of_that_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_for_vllm(tmp_path / "tiny")
    monkeypatch.setenv("FAKE_VLLM", "core fails")
    with (
        VllmPipeline.from_pretrained(tmp_path / "tiny", "cpu", vllm_python=fake_python(tmp_path)) as made,
        pytest.raises(
            LaneError, match=r"engine 0 failed: ValueError: no room for 5 blocks \(RuntimeError: Engine core"
        ),
    ):
        made.generate(PROMPTS, 4)


def test_on_a_gpu_an_engine_is_as_vllm_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    around = engine_environment(torch.device("cuda:1"))
    assert around["CUDA_VISIBLE_DEVICES"] == "5"
    assert (around["VLLM_ENABLE_V1_MULTIPROCESSING"], around["VLLM_WORKER_MULTIPROC_METHOD"]) == ("1", "spawn")
    assert engine_environment(torch.device("cpu"))["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.parametrize("of_its_own", [False, True], ids=["one process", "a core of its own"])
def test_the_first_and_last_token_have_vllms_times_or_all_those_of_their_steps(of_its_own: bool) -> None:
    from splitwiser_lab.engine.request import Request, Sampling
    from splitwiser_lab.pipelines.vllm.placement import VllmPlacement

    request = Request(0, [5, 6, 7], Sampling(max_new_tokens=3), 0.0)
    progress = Progress([request], VllmPlacement.of("sequential"))
    for number in range(3):
        step = {"start": float(number), "end": number + 0.9, "tokens": [["0", [number]]], "finished": []}
        if number == 2:
            known = {"first": None, "last": None} if of_its_own else {"first": 0.8, "last": 2.8}
            told = {"queued": 0.0, "scheduled": 0.1, "cached": 0, "preemptions": 0, **known}
            step["finished"] = [{"id": "0", "reason": "length", **told}]
        progress.listen("engine 0", step)
    assert request.token_times == ([0.9, 1.9, 2.9] if of_its_own else [0.8, 1.9, 2.8])


def test_a_whole_prompt_belongs_to_the_step_of_its_first_token() -> None:
    lane = _Lane([0.0, 1.0, 2.0], [0.9, 1.9, 2.9], [0, 0, 1], [(0.5, 2, 40)])
    assert lane.prefilled(None) == [(0, 0), (0, 0), (40, 1)], "whenever it was scheduled: cores schedule ahead"
    assert lane.prefilled(16) == [(16, 1), (16, 1), (8, 1)]
