"""The process lane: batches run in another process over the same weights and the same KV pool.

Weights and pool are mapped there once; per batch only its metadata travels one way and its tokens
the other. The worker is an ordinary child with its own interpreter, so scripts need no
`if __name__ == "__main__"`, and it ends by itself when its pipe closes: even a killed parent leaves
no process behind, and the shared memory, having no name, goes with the last of them.
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

from splitwiser_lab.errors import LaneError
from splitwiser_lab.hardware import cores
from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.transformer import Transformer

_START_SECONDS = 120.0
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker must know to map the weights and the pool; sent once."""

    config: ModelConfig
    dtype: str
    weights_fd: int
    packed: bool
    pool_fd: int
    pages: int
    page_size: int


class ProcessLane:
    """A lane in a child process. It computes on `cores`, which may be changed between two batches."""

    def __init__(self, name: str, transformer: Transformer) -> None:
        self.name, self._transformer = name, transformer
        self.cores: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready = False

    @property
    def pid(self) -> int | None:
        """The worker's process id while it runs."""
        return self._process.pid if self._process else None

    def spawn(self) -> None:
        """Start the worker without waiting for it, so that several can start side by side."""
        if self._process is not None:
            return
        weights, pool = self._transformer.weights, self._transformer.pool
        if weights.buffer is None or pool.buffer is None:
            raise LaneError(f"lane {self.name!r}: weights and pool are not in memory that processes can share.")
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (theirs.fileno(), weights.buffer.fd, pool.buffer.fd)
            command = [sys.executable, "-m", "splitwiser_lab.lanes.worker", str(theirs.fileno())]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
            try:  # in a process group of its own: Ctrl-C is for the parent, also while the worker still imports
                self._process = subprocess.Popen(
                    command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, process_group=0
                )
            except OSError as error:
                ours.close()
                raise LaneError(f"lane {self.name!r}: its process could not be started: {error}") from error
        self._connection = Connection(ours.detach())
        config, dtype = self._transformer.config, str(weights.dtype).removeprefix("torch.")
        setup = WorkerSetup(config, dtype, fds[1], weights.packed, fds[2], pool.pages, pool.page_size)
        with contextlib.suppress(OSError):  # a worker that died already is reported by `start`
            self._connection.send(setup)

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
        self.start()
        assert self._connection is not None
        try:
            self._connection.send((self.cores or cores(), batch))
        except OSError:
            raise self._died() from None
        return RemoteTicket(self, self._connection)

    def receive(self) -> BatchResult:
        """The worker's next answer. Raises LaneError when the batch failed there, or the worker died."""
        assert self._connection is not None
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, str):
            raise LaneError(f"lane {self.name!r}: a batch failed in its process:\n{answer}")
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
        self._process, self._connection, self._ready = None, None, False

    def _died(self) -> LaneError:
        process, pid, ready = self._process, self.pid, self._ready
        self.close()
        code = process.returncode if process else None
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with code {code}"
        hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
        lost = (
            "Its batch is lost; the lane starts a new process for the next one" if ready else "It had not started yet"
        )
        return LaneError(
            f"lane {self.name!r}: its process (pid {pid}) {how}{hint}. {lost}. "
            "If this repeats, try a smaller batch, pool or model."
        )


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
