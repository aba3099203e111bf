"""The guard of an MPS daemon: a small process that lets the daemon live as long as its parent, and no longer.

The daemon and the server it starts know nothing of the process that wanted them, which may be killed at
any moment. So this guard starts them, in a folder of their own, and ends them when the parent closes its
end of the leash, or dies. When the daemon or its server dies first, the guard ends the rest. Either way
it then closes the lifeline, on which all lane processes wait, and removes the folder.

It loads neither torch nor CUDA: it must not become a client of the daemon itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

CONTROL = "nvidia-cuda-mps-control"
_READY_SECONDS = 10.0
_QUIT_SECONDS = 3.0
_LOOK_SECONDS = 0.1  # between two looks at daemon and server
_PR_SET_CHILD_SUBREAPER = 36  # from Linux's prctl.h
_LONGEST_PATH = 60  # the daemon's sockets lie in the folder, and a socket's path has 108 bytes at most


def folder_environment(folder: str) -> dict[str, str]:
    """What daemon, server and clients must have in their environment to find each other, and nobody else."""
    return {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}


def users_of(folder: str) -> list[psutil.Process]:
    """All processes that were started with this folder as their MPS pipe directory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("CUDA_MPS_PIPE_DIRECTORY") == folder:
                found.append(process)
    return found


def sweep(folder: str) -> None:
    """Kill whatever still uses the folder, and remove it."""
    left = users_of(folder)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_QUIT_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


class Guard:
    """Starts the daemon, watches it and the leash, and tidies up."""

    def __init__(self, leash: int, lifeline: int) -> None:
        self._leash, self._lifeline = leash, lifeline
        short = len(tempfile.gettempdir()) <= _LONGEST_PATH
        self._folder = tempfile.mkdtemp(prefix="splitwiser_mps_", dir=None if short else "/tmp")
        self._environment = {**os.environ, **folder_environment(self._folder)}
        self._daemon: subprocess.Popen[bytes] | None = None
        self._server: psutil.Process | None = None

    def run(self) -> None:
        """Tell the parent the folder once the daemon answers, or why it does not; then guard it to its end."""
        try:
            reason = self._start()
            self._say(f"error {reason}" if reason else f"ready {self._folder}")
            while not reason and not self._parent_is_gone(_LOOK_SECONDS) and self._is_whole():
                pass
        finally:
            self._end()

    def _start(self) -> str | None:
        with open(Path(self._folder) / "output", "wb") as output:
            try:
                self._daemon = subprocess.Popen(
                    [CONTROL, "-f"], env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            except OSError as error:
                return f"{CONTROL} could not be started: {error}"
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            if self._daemon.poll() is not None:
                return f"{CONTROL} ended at once with code {self._daemon.returncode}: {self._said()}"
            if self._ask("get_server_list"):
                return None
            if self._parent_is_gone(_LOOK_SECONDS):
                return "its parent is gone"
        return f"{CONTROL} did not answer within {_READY_SECONDS:.0f} s: {self._said()}"

    def _ask(self, command: str) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            asked = subprocess.run(
                [CONTROL],
                input=f"{command}\n".encode(),
                env=self._environment,
                capture_output=True,
                timeout=_QUIT_SECONDS,
                check=False,
            )
            return asked.returncode == 0
        return False

    def _said(self) -> str:
        logs = [*sorted(Path(self._folder).glob("*.log")), Path(self._folder) / "output"]
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-3:]) or "it said nothing"

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._leash, text.encode())

    def _parent_is_gone(self, seconds: float) -> bool:
        return bool(select.select([self._leash], [], [], seconds)[0])  # it never writes: readable means closed

    def _is_whole(self) -> bool:
        """Whether the daemon runs, and the server too once it has started one for its first client."""
        assert self._daemon is not None
        if self._daemon.poll() is not None:
            return False
        if self._server is None:
            with contextlib.suppress(psutil.Error):
                self._server = next(iter(psutil.Process(self._daemon.pid).children()), None)
            return True
        with contextlib.suppress(psutil.Error):
            return bool(self._server.status() != psutil.STATUS_ZOMBIE)
        return False

    def _end(self) -> None:
        if self._daemon is not None and self._is_whole() and self._ask(f"quit -t {_QUIT_SECONDS / 2:.0f}"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._daemon.wait(_QUIT_SECONDS)
        os.close(self._lifeline)
        psutil.wait_procs(users_of(self._folder), timeout=1.0)  # lane processes end by themselves now
        sweep(self._folder)
        if self._daemon is not None:
            self._daemon.wait()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # a server that lost its daemon is this process's child
                pass


def main(leash: int, lifeline: int) -> None:
    """Guard a daemon for the parent at the other end of `leash`; hold the writing end of `lifeline`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the leash alone says when it is over
    # Orphans come to this process, which reaps them; in a container perhaps nobody else would.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Guard(leash, lifeline).run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
