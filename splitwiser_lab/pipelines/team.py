"""The worker processes of a pipeline: started side by side, asked for work, and ended together."""

from __future__ import annotations

import functools
import time
from multiprocessing.connection import wait

from splitwiser_lab.errors import LaneError
from splitwiser_lab.lanes.child import Child, Failure
from splitwiser_lab.lanes.mps import MpsDaemon, MpsShare
from splitwiser_lab.lanes.support import daemon_of, index_of
from splitwiser_lab.pipelines.kv import KVLayout
from splitwiser_lab.pipelines.messages import Job, Report, Setup, Slots
from splitwiser_lab.pipelines.placement import Placement, Role, device_of_child
from splitwiser_lab.pipelines.shared_model import SharedModel
from splitwiser_lab.shared_memory import Buffer, allocate

_MODULE = "splitwiser_lab.pipelines.worker"
_START_SECONDS = 120.0
SLOTS = 2  # one is decoded from while the other is filled


@functools.cache
def daemon_for(device: int) -> MpsDaemon:
    """The MPS daemon of all teams on GPU number `device`: their workers are clients of one server."""
    return daemon_of(device)


class Team:
    """Workers of one placement over shared weights, and the slots between them."""

    def __init__(
        self, placement: Placement, model: SharedModel, layout: KVLayout, device: str, slot_bytes: int
    ) -> None:
        """Start all workers; `await_ready` waits until each can take a job.

        `slot_bytes` are those of one batch between its phases; none are made where nothing is handed over.
        Raises LaneError when one cannot be started, HardwareError when there is no room.
        """
        import torch

        self.placement, self.slot_bytes = placement, slot_bytes if placement.mode == "split" else 0
        self.spawn_seconds: list[float] = []
        self._children: dict[str, Child] = {}
        self._buffer: Buffer | None = allocate(SLOTS * slot_bytes, device) if self.slot_bytes else None
        gpu = torch.device(device).type == "cuda"
        self._daemon: MpsDaemon | None = daemon_for(index_of(torch.device(device))) if placement.mps else None
        slots = None
        inherited = list(model.inherited)
        if self._buffer is not None:
            slots = Slots(self._buffer.export(), SLOTS, slot_bytes)
            inherited += [slots.handle] if isinstance(slots.handle, int) else []
        where = device_of_child(device, placement.mps)
        self._begun = time.perf_counter()
        try:
            for role, cores in zip(placement.roles, placement.cores(), strict=True):
                child = Child(f"process {role.name!r}", _MODULE, inherited, self._share(role))
                self._children[role.name] = child
                child.send(Setup(model.skeleton(), layout, slots, where, role.sm_share if gpu else None, cores))
        except BaseException:
            self.close()
            raise

    def await_ready(self) -> None:
        """Wait until every worker can take a job. Raises LaneError when one does not start; then all have ended.

        One does not whose share of the SMs multiplies wrongly: see `model/products.py`.
        """
        try:
            for name in list(self._children)[len(self.spawn_seconds) :]:
                self._await_start(name)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by the names of the workers."""
        return {name: child.pid for name, child in self._children.items()}

    @property
    def alive(self) -> bool:
        """Whether every worker can take a job."""
        ready = len(self.spawn_seconds)  # the others may say that they are ready now
        words = any(child.connection.poll() for child in list(self._children.values())[:ready])
        return bool(self._children) and not words and not any(child.gone for child in self._children.values())

    def send(self, name: str, job: Job) -> None:
        """Give a worker a job; it does one at a time."""
        self._children[name].send(job)

    def wait(self, timeout: float | None) -> list[tuple[str, Report]]:
        """Reports of workers, at least one unless `timeout` seconds pass. Raises LaneError when one failed or died."""
        names = {child.connection: name for name, child in self._children.items()}
        return [(names[connection], self._receive(names[connection])) for connection in wait(list(names), timeout)]  # type: ignore[index]

    def close(self) -> None:
        """End every worker and give back the slots."""
        for child in self._children.values():
            child.let_go()
        for child in self._children.values():
            child.end()
        self._children.clear()
        self._buffer = None

    def _share(self, role: Role) -> MpsShare | None:
        return MpsShare(self._daemon, role.sm_share) if self._daemon and role.sm_share else None

    def _await_start(self, name: str) -> None:
        if not self._children[name].connection.poll(_START_SECONDS):
            raise LaneError(f"process {name!r} did not start within {_START_SECONDS:.0f} s.")
        self._receive(name, " did not start: ")
        self.spawn_seconds.append(time.perf_counter() - self._begun)

    def _receive(self, name: str, failed: str = ": a batch failed there:\n") -> Report:
        child = self._children[name]
        try:
            answer = child.connection.recv()
        except (EOFError, OSError):
            raise LaneError(
                f"{child.how_it_ended()}. Its batch is lost and the run with it; the next run starts new processes. "
                "If this repeats, try a smaller batch, fewer processes, or a smaller model."
            ) from None
        if isinstance(answer, Failure):
            raise LaneError(f"process {name!r}{failed}{answer.text}")
        return answer  # type: ignore[no-any-return]
