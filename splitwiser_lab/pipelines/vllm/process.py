"""One engine's process: started with vLLM's own Python, asked by lines of JSON, ended with all its children."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from splitwiser_lab.errors import LaneError, ModeError
from splitwiser_lab.lanes.child import Child
from splitwiser_lab.lanes.mps import MpsShare
from splitwiser_lab.lanes.support import only_visible
from splitwiser_lab.measure.peers import find_vllm

PROGRAM = Path(__file__).with_name("engine_side") / "run_engine.py"
VERSIONS = ((0, 24), (0, 32))  # oldest and newest that were tried
_SAID_LINES = 8
_END_SECONDS = 10.0


def vllm_python(given: str | None) -> str:
    """The Python that runs vLLM. Raises ModeError, which says how to get one."""
    found = find_vllm(given)
    if found is None:
        raise ModeError(
            "the vLLM pipeline needs vLLM, which lives in an environment of its own: `make vllm` sets one up for a CPU "
            "(3.5 GB); or give the Python of an environment that has vLLM, by vllm_python or --vllm."
        )
    return found


def check_version(version: str, python: str) -> None:
    """Raise ModeError for a version of vLLM that nobody has tried with this pipeline."""
    (oldest, newest), parts = VERSIONS, version.split(".")
    with contextlib.suppress(ValueError, IndexError):
        if oldest <= (int(parts[0]), int(parts[1])) <= newest:
            return
    known = " to ".join(f"{major}.{minor}" for major, minor in VERSIONS)
    raise ModeError(
        f"{python} has vLLM {version}, and this pipeline knows {known}: set up one of these in an environment of its "
        "own (`make vllm` does so for a CPU)."
    )


def engine_environment(device: torch.device) -> dict[str, str]:
    """What vLLM reads from its environment."""
    own = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if device.type == "cpu":  # one process: vLLM would set a core aside for its scheduler
        return own | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # As vLLM comes: the core, which schedules and computes, in a process beside the one that makes outputs. It is
    # spawned, since a fork would hold this end's socket open.
    core = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    return {"VLLM_USE_FLASHINFER_SAMPLER": "0", **own, **core, **only_visible(device)}


class EngineProcess(Child):
    """A running engine and this end of its socket. What it prints goes to a file that errors quote."""

    def __init__(
        self,
        name: str,
        python: str,
        environment: Mapping[str, str],
        inherited: Sequence[int] = (),
        share: MpsShare | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start it, in `folder` (None: the current one); with `share`, as a client of an MPS daemon.

        Raises LaneError, or ModeError without that Python.
        """
        self._who, self._share, self._ended, self._words = f"vLLM's {name}", share, False, ""
        around = {**environment, **(share.enter() if share else {})}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with this object
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno(), *([share.lifeline] if share else [])]
            try:  # in a process group of its own: Ctrl-C is for the parent, and all of it can be ended at once
                self._process = subprocess.Popen(
                    [_absolute(python), str(PROGRAM), *map(str, fds)],
                    pass_fds=[*fds, *inherited],
                    env=_for_another_python(around),
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                    process_group=0,
                    cwd=folder,
                )
            except OSError as error:
                ours.close()
                if share:
                    share.leave()
                raise ModeError(f"vLLM's Python {python!r} cannot be started: {error}. See `make vllm`.") from error
        self.connection = Connection(ours.detach())

    def ask(self, message: dict[str, Any]) -> None:
        """Send a message; a process that has gone is noticed by the next `hear`."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps(message).encode())

    def hear(self) -> dict[str, Any]:
        """The next message. Raises LaneError when the process failed, died or refused, with vLLM's own words."""
        try:
            message: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise LaneError(
                f"{self.how_it_ended()}. Its requests are lost and the run with it; the next run starts new "
                f"processes. It said: {self._words or 'nothing'}"
            ) from None
        if message["kind"] == "failure":
            told = message["error"]
            if "engine core" in told.lower() or "enginecore" in told.lower():  # it knows no more than that
                told = f"{_last_error(self._said())} ({told})"
            raise LaneError(f"{self._who} failed: {told}\n{message['text']}")
        if message["kind"] == "refused":
            raise LaneError(f"{self._who} did not start: {message['error']}")
        return message

    def end(self) -> None:
        """End it and whatever it started. Ending twice does nothing."""
        if self._ended:
            return
        super().end()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
            _await_end_of_group(self._process.pid)  # on a GPU its core holds the memory
        if not self._output.closed:
            self._words = self._tail()
            self._output.close()

    def _said(self) -> list[str]:
        """All that it and its core printed, in lines."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace").splitlines()

    def _tail(self) -> str:
        """The last of that."""
        return "\n".join(line for line in self._said()[-_SAID_LINES:] if line.strip())


def _last_error(lines: Sequence[str]) -> str:
    """The error that an engine's core logged: of the last traceback the line with the error's name."""
    found = [match[0] for line in lines if (match := re.search(r"\b\w+(Error|Exception): .*", line))]
    core = [error for error in found if "ngine core" not in error and "EngineCore" not in error]
    return core[-1] if core else "the engine's core ended, and logged no error"


def _await_end_of_group(group: int) -> None:
    """Wait until no process of a killed group runs: what one has started is nobody's child here."""
    until = time.monotonic() + _END_SECONDS
    while time.monotonic() < until and any(_runs_in(group, process) for process in psutil.process_iter(["status"])):
        time.sleep(0.01)


def _runs_in(group: int, process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError):
        return False


def _for_another_python(around: Mapping[str, str]) -> dict[str, str]:
    """This environment, without what belongs to this Python, and without anybody's size of the KV cache."""
    hidden = ("PYTHONHOME", "VIRTUAL_ENV", "VLLM_CPU_KVCACHE_SPACE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    if path := kept.get("PYTHONPATH"):  # the engine may run in another folder
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in path.split(os.pathsep))
    return kept | dict(around)


def _absolute(program: str) -> str:
    """A program's path, whatever folder it is started in; a bare name is looked for along the path."""
    return os.path.abspath(program) if os.path.dirname(program) else program
