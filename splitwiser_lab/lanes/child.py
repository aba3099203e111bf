"""Child processes that end with their parent: how they are started, told to end, and what they do first.

A child is an ordinary process with an interpreter of its own, so scripts need no `if __name__ ==
"__main__"`. It hears and speaks through a socket that only parent and child hold: when the parent is
gone, killed or not, the socket closes and the child ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from splitwiser_lab.errors import LaneError

if TYPE_CHECKING:
    from splitwiser_lab.lanes.mps import MpsShare

_STOP_SECONDS = 5.0
_NO_DAEMON = 75  # exit code, as sysexits.h has it: what was needed is gone for now


@dataclass(frozen=True)
class Failure:
    """A child's answer to something that failed; `fatal` when the child ends with it."""

    text: str
    fatal: bool


def environment(around: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a child of this package has in its environment: all of ours, where to import from, and `around`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **(around or {})}


class Child:
    """A running child process, and this end of its socket."""

    def __init__(self, who: str, module: str, inherited: Sequence[int] = (), share: MpsShare | None = None) -> None:
        """Start `python -m module FD [LIFELINE]`. With `share`, it is a client of an MPS daemon.

        `who` is what errors call it; `inherited` are file descriptors that it keeps. Raises LaneError.
        """
        self._who, self._share = who, share
        around = share.enter() if share else {}
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno(), *([share.lifeline] if share else [])]
            try:  # in a process group of its own: Ctrl-C is for the parent, also while the child still imports
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module, *map(str, fds)],
                    pass_fds=[*fds, *inherited],
                    env=environment(around),
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )
            except OSError as error:
                ours.close()
                if share:
                    share.leave()
                raise LaneError(f"{who}: its process could not be started: {error}") from error
        self.connection = Connection(ours.detach())
        self._ended = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def gone(self) -> bool:
        """Whether it, or the MPS daemon that it needs, has ended."""
        return self._process.poll() is not None or (self._share is not None and self._share.daemon.ended())

    def send(self, message: Any) -> None:
        """Send a message; one that cannot be sent is noticed by the next `recv`, which tells how the child ended."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def let_go(self) -> None:
        """Ask it to end, without waiting: several can end side by side."""
        self.connection.close()

    def end(self) -> None:
        """End it: closing its socket asks it to, a kill makes it. Ending twice does nothing."""
        self.let_go()
        if self._ended:
            return
        self._ended = True
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._share:
            self._share.leave()

    def how_it_ended(self) -> str:
        """`lane 'decode': its process (pid 7) was killed by SIGKILL (often: out of memory)`; ends what is left."""
        ended = self._share is not None and self._share.daemon.ended()
        self.end()
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
        hint = " because the MPS daemon ended or was killed" if ended else hint
        return f"{self._who}: its process (pid {self.pid}) {how}{hint}"


def run_child(serve: Callable[[Connection], None]) -> None:
    """The main program of a child: `serve` its socket until the parent closes it, then end at once.

    Under MPS, end as soon as the lifeline closes: a client of a dead daemon may wait for its GPU for ever.
    """
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
        fd, *lifeline = map(int, sys.argv[1:3])
        if lifeline:
            threading.Thread(target=_end_with, args=lifeline, daemon=True).start()
        with Connection(fd) as connection, contextlib.suppress(EOFError, ConnectionError):
            serve(connection)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # there is nothing to tidy up, and PyTorch would take a second over it


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)  # nobody writes: it returns when the last who could is gone
    os._exit(_NO_DAEMON)


def gpu_refuses() -> bool:
    """Whether an error has cost this process its GPU: after most kinds, every later call fails too."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def compute_on(cores: Sequence[int]) -> None:
    """Compute with one thread for each of `cores`, and keep every thread of this process there (Linux)."""
    import torch

    torch.set_num_threads(len(cores))
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)
