"""The process lane: batches run in another process over the same weights and the same KV pool.

Weights and pool are mapped there once; per batch only its metadata travels one way and its tokens
the other. The worker is an ordinary child with its own interpreter, so scripts need no
`if __name__ == "__main__"`, and it ends by itself when its pipe closes: even a killed parent leaves
no process behind. Memory of a CPU has no name and goes with the last of them; memory of a GPU belongs
to the parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from splitwiser_lab.errors import HardwareError, LaneError
from splitwiser_lab.hardware import cores
from splitwiser_lab.lanes.mps import MpsShare
from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.transformer import Transformer
from splitwiser_lab.shared_memory import Handle

_START_SECONDS = 120.0
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker must know to map the weights and the pool; sent once."""

    lane: str
    config: ModelConfig
    dtype: str
    device: str
    weights: Handle
    packed: bool
    pool: Handle
    pages: int
    page_size: int
    under_mps: bool


@dataclass(frozen=True)
class Failure:
    """A worker's answer to a batch that failed; `fatal` when the worker ends with it."""

    text: str
    fatal: bool


class ProcessLane:
    """A lane in a child process. On a CPU it computes on `cores`, which may be changed between two batches."""

    def __init__(self, name: str, transformer: Transformer, share: MpsShare | None = None) -> None:
        """With `share`, the child is a client of an MPS daemon and has that share of the GPU's SMs."""
        self.name, self._transformer, self._share = name, transformer, share
        self.on_cpu = torch.device(transformer.weights.device).type == "cpu"
        self.cores: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready = self._busy = False

    @property
    def pid(self) -> int | None:
        """The worker's process id while it runs."""
        return self._process.pid if self._process else None

    def spawn(self) -> None:
        """Start the worker without waiting for it, so that several can start side by side."""
        if self._process is not None:
            return
        setup = self._setup()
        around = self._share.enter() if self._share else {}
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [theirs.fileno(), *([self._share.lifeline] if self._share else [])]
            mapped = [handle for handle in (setup.weights, setup.pool) if isinstance(handle, int)]
            command = [sys.executable, "-m", "splitwiser_lab.lanes.worker", *map(str, fds)]
            path = os.pathsep.join(p for p in sys.path if p)
            try:  # in a process group of its own: Ctrl-C is for the parent, also while the worker still imports
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[*fds, *mapped],
                    env={**os.environ, "PYTHONPATH": path, **around},
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )
            except OSError as error:
                ours.close()
                if self._share:
                    self._share.leave()
                raise LaneError(f"lane {self.name!r}: its process could not be started: {error}") from error
        self._connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # a worker that died already is reported by `start`
            self._connection.send(setup)

    def _setup(self) -> WorkerSetup:
        weights, pool = self._transformer.weights, self._transformer.pool
        device = torch.device(weights.device)
        if not self.on_cpu:  # an MPS client sees only the GPU of its daemon
            device = torch.device("cuda", 0 if self._share else torch.empty(0, device=device).device.index)
        try:
            handles = weights.buffer.export(), pool.buffer.export()
        except HardwareError as error:
            raise LaneError(f"lane {self.name!r}: {error}.") from error
        dtype = str(weights.dtype).removeprefix("torch.")
        under_mps = self._share is not None and not self.on_cpu
        return WorkerSetup(
            self.name,
            self._transformer.config,
            dtype,
            str(device),
            handles[0],
            weights.packed,
            handles[1],
            pool.pages,
            pool.page_size,
            under_mps,
        )

    def start(self) -> None:
        """Start the worker if need be and wait until it can take batches. Raises LaneError when it cannot."""
        self.spawn()
        assert self._connection is not None
        if not self._ready:
            if not self._connection.poll(_START_SECONDS):
                self.close()
                raise LaneError(f"lane {self.name!r}: its process did not start within {_START_SECONDS:.0f} s.")
            self.receive()
            self._ready = True

    def submit(self, batch: Batch) -> RemoteTicket:
        """Send a batch. A worker that died since its last batch, or never saw this one, is started anew."""
        if self._ready and not self._busy and self._died_idle():
            self.close()
        self.start()
        try:
            connection = self._send(batch)
        except OSError:
            self.close()
            self.start()
            try:
                connection = self._send(batch)
            except OSError:
                raise self._died() from None
        self._busy = True
        return RemoteTicket(self, connection)

    def _send(self, batch: Batch) -> Connection:
        assert self._connection is not None
        self._connection.send(((self.cores or cores()) if self.on_cpu else None, batch))
        return self._connection

    def _died_idle(self) -> bool:
        """Whether worker or daemon are gone. Between two batches a worker has nothing to say: if it does, it ended."""
        assert self._process is not None and self._connection is not None
        gone = self._process.poll() is not None or self._connection.poll()
        return gone or (self._share is not None and self._share.daemon.ended())

    def receive(self) -> BatchResult:
        """The worker's next answer. Raises LaneError when the batch failed there, or the worker died."""
        assert self._connection is not None
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        self._busy = False
        if isinstance(answer, Failure):
            what = "a batch failed in its process" if self._ready else "its process could not start"
            if answer.fatal:
                what += self._why_daemon_ended(wait=1.0)  # it dies before the guard has noticed
                self.close()
            raise LaneError(f"lane {self.name!r}: {what}:\n{answer.text}")
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the worker: closing its pipe asks it to, a kill makes it."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._share:
                self._share.leave()
        self._process, self._connection, self._ready, self._busy = None, None, False, False

    def _died(self) -> LaneError:
        process, pid, ready = self._process, self.pid, self._ready
        because = self._why_daemon_ended()
        self.close()
        code = process.returncode if process else None
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with code {code}"
        hint = because or (" (often: out of memory)" if code == -signal.SIGKILL else "")
        lost = (
            "Its batch is lost; the lane starts a new process for the next one" if ready else "It had not started yet"
        )
        return LaneError(
            f"lane {self.name!r}: its process (pid {pid}) {how}{hint}. {lost}. "
            "If this repeats, try a smaller batch, pool or model."
        )

    def _why_daemon_ended(self, wait: float = 0.0) -> str:
        ended = self._share is not None and self._share.daemon.ended(wait)
        return " because the MPS daemon ended or was killed" if ended else ""


class RemoteTicket:
    """A batch under way in another process."""

    def __init__(self, lane: ProcessLane, connection: Connection) -> None:
        self._lane, self._connection = lane, connection

    def done(self) -> bool:
        return self._connection.closed or self._connection.poll()

    def result(self) -> BatchResult:
        return self._lane.receive()

    def connection(self) -> Connection | None:
        return self._connection
