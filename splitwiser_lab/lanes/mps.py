"""NVIDIA MPS for lane processes: one daemon of our own, and a share of the SMs for each of its clients.

Only processes started with the daemon's folder in their environment are its clients: the lane processes,
not this one. The compute mode of the GPU stays as it is, and no other user of the GPU notices.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass

from splitwiser_lab.errors import LaneError
from splitwiser_lab.lanes.child import environment
from splitwiser_lab.lanes.mps_guard import folder_environment, sweep

# Percent of the SMs, which may overlap. Not every share computes right: see `model.products`.
DEFAULT_SHARES = {"prefill": 90, "decode": 25}
_START_SECONDS = 30.0
_STOP_SECONDS = 20.0


class MpsDaemon:
    """The daemon runs while somebody holds it: from the first `hold` to the last `release`."""

    def __init__(self, gpu: str | None = None) -> None:
        """`gpu` is the UUID of the only GPU that it serves, None for all that are visible."""
        self._gpu = gpu
        self._holders = 0
        self._lock = threading.Lock()
        self._guard: subprocess.Popen[bytes] | None = None
        self._leash: socket.socket | None = None
        self._lifeline = -1
        self._folder = ""

    @property
    def pid(self) -> int | None:
        """Process id of the guard while there is one."""
        return self._guard.pid if self._guard else None

    @property
    def lifeline(self) -> int:
        """A descriptor that becomes readable when the daemon has ended, whatever ended it."""
        return self._lifeline

    def ended(self, wait: float = 0.0) -> bool:
        """Whether there is no daemon, or it ends within `wait` seconds."""
        return self._guard is None or bool(select.select([self._lifeline], [], [], wait)[0])

    def hold(self) -> None:
        """Start the daemon unless it runs. Raises LaneError with the reason when it does not start."""
        with self._lock:
            if self.ended():
                self._end()  # of one that was killed, something may be left
                self._start()
            self._holders += 1

    def release(self) -> None:
        """End the daemon when nobody holds it any more."""
        with self._lock:
            self._holders -= 1
            if self._holders <= 0:
                self._holders = 0
                self._end()

    def environment(self, share: int) -> dict[str, str]:
        """What makes a child a client with `share` percent of the SMs; it counts when CUDA starts there."""
        only = {"CUDA_VISIBLE_DEVICES": self._gpu} if self._gpu else {}
        return {**only, **folder_environment(self._folder), "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share)}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._lifeline, writing = os.pipe()
        fds = (theirs.fileno(), writing)
        only = {"CUDA_VISIBLE_DEVICES": self._gpu} if self._gpu else {}
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "splitwiser_lab.lanes.mps_guard", *map(str, fds)],
                pass_fds=fds,
                env=environment(only),
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the parent
            )
        except OSError as error:
            ours.close()
            os.close(self._lifeline)
            raise LaneError(f"the guard of the MPS daemon could not be started: {error}") from error
        finally:
            theirs.close()
            os.close(writing)
        self._leash = ours
        ours.settimeout(_START_SECONDS)
        try:
            state, _, rest = ours.recv(4096).decode().partition(" ")
        except OSError as error:
            state, rest = "error", f"it did not answer ({error})"
        if state != "ready":
            self._end()
            raise LaneError(f"the MPS daemon did not start: {rest or 'its guard was killed'}")
        self._folder = rest

    def _end(self) -> None:
        if self._guard is None:
            return
        assert self._leash is not None
        self._leash.close()  # the guard now ends the daemon and itself
        try:
            self._guard.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        if self._guard.returncode != 0 and self._folder:
            sweep(self._folder)  # it was killed before it could
        os.close(self._lifeline)
        self._guard, self._leash, self._lifeline, self._folder = None, None, -1, ""


@dataclass(frozen=True)
class MpsShare:
    """The surroundings of a lane process: `percent` of the SMs under `daemon`."""

    daemon: MpsDaemon
    percent: int

    def enter(self) -> dict[str, str]:
        """Hold the daemon, and give what a child needs in its environment. Raises LaneError."""
        self.daemon.hold()
        return self.daemon.environment(self.percent)

    @property
    def lifeline(self) -> int:
        return self.daemon.lifeline

    def leave(self) -> None:
        """Let go of the daemon."""
        self.daemon.release()
