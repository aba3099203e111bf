"""The process lane: batches run in another process over the same weights and the same KV pool.

Weights and pool are mapped there once; per batch only its metadata travels one way and its tokens
the other. The worker is an ordinary child with its own interpreter, so scripts need no
`if __name__ == "__main__"`, and it ends by itself when its pipe closes: even a killed parent leaves
no process behind. Memory of a CPU has no name and goes with the last of them; memory of a GPU belongs
to the parent.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from splitwiser_lab.errors import HardwareError, LaneError
from splitwiser_lab.hardware import cores
from splitwiser_lab.lanes.child import Child, Failure
from splitwiser_lab.lanes.mps import MpsShare
from splitwiser_lab.lanes.wire import Answer, Ready, Sender, has_come, pack_work, receive_answer
from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.graph_shapes import UsualWork
from splitwiser_lab.model.transformer import Transformer
from splitwiser_lab.shared_memory import Handle

_START_SECONDS = 120.0


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
    mps_share: int | None  # percent of the SMs; None without MPS


class ProcessLane:
    """A lane in a child process. On a CPU it computes on `cores`, which may be changed between two batches."""

    def __init__(self, name: str, transformer: Transformer, share: MpsShare | None = None) -> None:
        """With `share`, the child is a client of an MPS daemon and has that share of the GPU's SMs."""
        self.name, self._transformer, self._share = name, transformer, share
        self.on_cpu = torch.device(transformer.weights.device).type == "cpu"
        self.cores: list[int] = []
        self._child: Child | None = None
        self.depth = 1  # until the worker says otherwise
        self._ready = False
        self._warm: set[UsualWork] = set()
        self._lock = threading.RLock()  # a thread may look whether the worker lives while another feeds it
        self._sender = Sender()
        self._under_way: deque[RemoteTicket] = deque()  # in the order in which the answers come

    @property
    def pid(self) -> int | None:
        """The worker's process id while it runs."""
        return self._child.pid if self._child else None

    @property
    def connection(self) -> Connection | None:
        """The pipe to the worker while it runs."""
        return self._child.connection if self._child else None

    def spawn(self) -> None:
        """Start the worker without waiting for it, so that several can start side by side."""
        if self._child is not None:
            return
        setup = self._setup()
        mapped = [handle for handle in (setup.weights, setup.pool) if isinstance(handle, int)]
        self._child = Child(f"lane {self.name!r}", "splitwiser_lab.lanes.worker", mapped, self._share)
        self._child.send(setup)

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
        mps_share = self._share.percent if self._share is not None and not self.on_cpu else None
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
            mps_share,
        )

    def start(self) -> None:
        """Start the worker unless it runs, and wait until it can take batches. Raises LaneError when it cannot."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._ready and not self._under_way and self._died_idle():
            self.close()
        self.spawn()
        assert self._child is not None
        if not self._ready:
            if not self._child.connection.poll(_START_SECONDS):
                self.close()
                raise LaneError(f"lane {self.name!r}: its process did not start within {_START_SECONDS:.0f} s.")
            ready = self.receive()
            assert isinstance(ready, Ready)
            self.depth, self._ready = ready.depth, True

    def warm_up(self, work: UsualWork) -> None:
        """Let the worker make what such batches need; on a CPU there is nothing. Raises LaneError."""
        self.start()
        if self.on_cpu or work in self._warm:
            return
        assert self._child is not None
        try:
            self._child.connection.send_bytes(pack_work(work))
            self.receive()
        except LaneError:
            raise
        except OSError:
            raise self._died() from None
        except BaseException:
            self.close()  # its answer, still to come, would be taken for the next batch's
            raise
        self._warm.add(work)

    def submit(self, batch: Batch) -> RemoteTicket:
        """Send a batch. A worker that died since its last batch, or never saw this one, is started anew."""
        with self._lock:
            return self._submit(batch)

    def _submit(self, batch: Batch) -> RemoteTicket:
        self.start()
        try:
            self._send(batch)
        except OSError:
            if self._under_way:
                raise self._died() from None
            self.close()
            self.start()
            try:
                self._send(batch)
            except OSError:
                raise self._died() from None
        ticket = RemoteTicket(self)
        self._under_way.append(ticket)
        return ticket

    def _send(self, batch: Batch) -> None:
        assert self._child is not None
        share = (self.cores or cores()) if self.on_cpu else None
        self._child.connection.send_bytes(self._sender.pack(batch, share))

    def _died_idle(self) -> bool:
        """Whether worker or daemon are gone. Between two batches a worker has nothing to say: if it does, it ended."""
        assert self._child is not None
        return self._child.gone or has_come(self._child.connection)

    def has_answer_for(self, ticket: RemoteTicket) -> bool:
        """Whether the next answer is that ticket's, and has come."""
        assert self._child is not None
        return self._under_way[0] is ticket and has_come(self._child.connection)

    def collect(self) -> None:
        """Wait for the next answer and give it to its ticket. An error is an answer, too."""
        answer: Answer | LaneError
        try:
            answer = self.receive()
        except LaneError as error:
            answer = error
        assert isinstance(answer, BatchResult | LaneError)
        if self._under_way:  # else the worker died, and each has got its error
            self._under_way.popleft().answer = answer

    def receive(self) -> Answer:
        """The worker's next answer. Raises LaneError when the batch failed there, or the worker died."""
        assert self._child is not None
        try:
            answer = receive_answer(self._child.connection)
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, Failure):
            what = "a batch failed in its process" if self._ready else "its process could not start"
            if answer.fatal:
                what += self._why_daemon_ended(wait=1.0)  # it dies before the guard has noticed
            error = LaneError(f"lane {self.name!r}: {what}:\n{answer.text}")
            if answer.fatal:
                self._end(error)
            raise error
        return answer

    def close(self) -> None:
        """End the worker: closing its pipe asks it to, a kill makes it."""
        self._end(LaneError(f"lane {self.name!r} was closed while a batch was under way."))

    def _end(self, error: LaneError) -> None:
        for ticket in self._under_way:
            ticket.answer = error
        self._under_way.clear()
        if self._child is not None:
            self._child.end()
        self._child, self._ready = None, False
        self._warm.clear()
        self._sender = Sender()

    def _died(self) -> LaneError:
        """End what is left of the worker, with an error for all its batches that says how it ended."""
        ready, under_way = self._ready, list(self._under_way)
        assert self._child is not None
        how = self._child.how_it_ended()
        self.close()
        lost = (
            "Its batch is lost; the lane starts a new process for the next one" if ready else "It had not started yet"
        )
        error = LaneError(f"{how}. {lost}. If this repeats, try a smaller batch, pool or model.")
        for ticket in under_way:
            ticket.answer = error
        return error

    def _why_daemon_ended(self, wait: float = 0.0) -> str:
        ended = self._share is not None and self._share.daemon.ended(wait)
        return " because the MPS daemon ended or was killed" if ended else ""


class RemoteTicket:
    """A batch under way in another process."""

    def __init__(self, lane: ProcessLane) -> None:
        self._lane = lane
        self.answer: BatchResult | LaneError | None = None

    def done(self) -> bool:
        return self.answer is not None or self._lane.has_answer_for(self)

    def result(self) -> BatchResult:
        while self.answer is None:
            self._lane.collect()
        if isinstance(self.answer, LaneError):
            raise self.answer
        return self.answer

    def connection(self) -> Connection | None:
        return self._lane.connection
