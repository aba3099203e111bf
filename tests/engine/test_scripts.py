"""The engine in programs of their own: plain scripts, killed parents, Ctrl-C of a whole process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny_models import expected, prompts_of, tiny

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = prompts_of(12, 30)
pytestmark = pytest.mark.timeout(120)

# No `if __name__ == "__main__"`: a worker that imported the script again would start workers without end.
PLAIN = """
import json, sys
from splitwiser_lab import Engine
engine = Engine.from_pretrained({model!r}, mode="processes", kv_tokens=1024)
print(json.dumps(engine.generate({prompts}, 6).tokens))
"""
CLOSED = PLAIN + "engine.close()\n"

FOREVER = """
import json, os, sys, time
from splitwiser_lab import Engine
engine = Engine.from_pretrained({model!r}, mode="processes", kv_tokens=1024)
print(json.dumps([lane.pid for lane in engine._core.lanes]), flush=True)
while True:
    engine.generate({prompts}, 200)
"""

SURVIVES = """
import json, sys
from splitwiser_lab import Engine
engine = Engine.from_pretrained({model!r}, kv_tokens=1024)
print("loaded", flush=True)
for attempt in range(3):
    try:
        engine.set_mode("processes")
        while True:
            engine.generate({prompts}, 200)
    except KeyboardInterrupt:
        print(json.dumps(engine.generate({prompts}, 6).tokens), flush=True)
engine.close()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def script(model: str, tmp_path: Path) -> Iterator[object]:
    """Starts a script in a new process group; whatever is left of it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str) -> subprocess.Popen[str]:
        file = tmp_path / "script.py"
        file.write_text(text.format(model=model, prompts=PROMPTS), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def gone(pids: list[int], seconds: float) -> bool:
    """Whether all end within `seconds`; what nobody reaps in a container counts as ended."""
    deadline = time.monotonic() + seconds
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("text", [PLAIN, CLOSED], ids=["not closed", "closed"])
def test_a_plain_script(script: object, text: str) -> None:
    process = script(text)
    children: set[int] = set()
    while process.poll() is None:
        children |= {child.pid for child in _children(process.pid)}
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == expected("llama", PROMPTS, 6)
    assert "Traceback" not in err
    assert len(children) == 2, "a worker for each phase, and no more"
    assert gone(list(children), 5)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_parent_leaves_no_worker(script: object, number: signal.Signals) -> None:
    process = script(FOREVER)
    workers = json.loads(process.stdout.readline())
    assert len(workers) == 2 and all(_runs(pid) for pid in workers)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(10) == -number
    assert gone(workers, 5)


def test_a_stopped_notebook_cell(script: object) -> None:
    """Ctrl-C reaches the whole process group: while workers import, while they start, while they work."""
    process = script(SURVIVES)
    assert process.stdout.readline().strip() == "loaded"
    for wait in (0.3, 1.0, 4.0):
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        assert json.loads(line) == expected("llama", PROMPTS, 6)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
