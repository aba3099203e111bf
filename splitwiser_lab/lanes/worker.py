"""The other end of a process lane: map weights and pool, then run batches until the pipe closes."""

from __future__ import annotations

import traceback
from collections import deque
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from splitwiser_lab.errors import LaneError
from splitwiser_lab.lanes.base import wait_any
from splitwiser_lab.lanes.child import Failure, compute_on, gpu_refuses, run_child
from splitwiser_lab.lanes.process import WorkerSetup
from splitwiser_lab.lanes.wire import Ready, Receiver, send_answer, unpack_work

if TYPE_CHECKING:
    from splitwiser_lab.lanes.base import Lane, Ticket
    from splitwiser_lab.model.batch import BatchResult

_LOOK_SECONDS = 1e-4  # between two looks at a GPU's events, while another batch may come


def serve(connection: Connection) -> None:
    """Serve the batches that arrive. Every answer is a BatchResult or a Failure."""
    setup: WorkerSetup = connection.recv()
    try:
        lane = _lane(setup)
    except LaneError as error:  # it says all that there is to say
        send_answer(connection, Failure(str(error), fatal=True))
        return
    except Exception:
        send_answer(connection, Failure(traceback.format_exc(), fatal=True))
        return
    send_answer(connection, Ready(lane.depth))
    Server(connection, lane).run()


def _lane(setup: WorkerSetup) -> Lane:
    """The lane in which this process runs its batches, over the parent's memory."""
    import torch

    from splitwiser_lab.cuda_driver import mps_enabled
    from splitwiser_lab.lanes.device import DeviceLane
    from splitwiser_lab.lanes.inline import InlineLane
    from splitwiser_lab.model.kv_pool import KVPool
    from splitwiser_lab.model.products import part_under_mps
    from splitwiser_lab.model.transformer import Transformer
    from splitwiser_lab.model.weights import Weights

    dtype = getattr(torch, setup.dtype)
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if setup.mps_share is not None and not mps_enabled(device.index):
        raise RuntimeError("CUDA started here without the MPS daemon, which would be another mode")
    weights = Weights(setup.config, dtype, setup.device, setup.weights, setup.packed)
    pool = KVPool(setup.config, dtype, setup.device, setup.pages, setup.page_size, setup.pool)
    transformer = Transformer(weights, pool)
    if device.type == "cpu":
        return InlineLane(setup.lane, transformer)
    part = ""
    if setup.mps_share is not None and setup.mps_share != 100:
        part = part_under_mps(setup.mps_share, device)
    lane = DeviceLane(setup.lane, transformer, torch.cuda.Stream(device), part=part)
    lane.start()
    return lane


class Server:
    """Runs the batches that come, as many at a time as the lane takes, and answers in their order."""

    def __init__(self, connection: Connection, lane: Lane) -> None:
        self._connection, self._lane, self._receiver = connection, lane, Receiver()
        self._under_way: deque[Ticket | Failure | Ready] = deque()
        self._cores: list[int] | None = None

    def run(self) -> None:
        """Serve until the pipe closes (EOFError or ConnectionError), or the GPU refuses this process."""
        while True:
            if self._under_way and (len(self._under_way) >= self._lane.depth or self._oldest_is_done()):
                if not self._answer(self._under_way.popleft()):
                    return
            elif not self._under_way or self._connection.poll(_LOOK_SECONDS):
                self._under_way.append(self._take())

    def _oldest_is_done(self) -> bool:
        oldest = self._under_way[0]
        return isinstance(oldest, Failure | Ready) or oldest.done()

    def _take(self) -> Ticket | Failure | Ready:
        """Begin the next batch, or warm up if that is asked for; wait if there is nothing to do."""
        data = self._connection.recv_bytes()
        try:
            if work := unpack_work(data):
                self._lane.warm_up(work)
                return Ready(self._lane.depth)
            batch, cores = self._receiver.unpack(data)
            if cores is not None and cores != self._cores:
                compute_on(cores)
                self._cores = cores
            return self._lane.submit(batch)
        except Exception:
            return Failure(traceback.format_exc(), gpu_refuses())

    def _answer(self, oldest: Ticket | Failure | Ready) -> bool:
        """Send what came of a batch, once it is done. False when it was this process's last."""
        answer = oldest if isinstance(oldest, Failure | Ready) else self._result(oldest)
        send_answer(self._connection, answer)
        return not (isinstance(answer, Failure) and answer.fatal)

    def _result(self, ticket: Ticket) -> BatchResult | Failure:
        wait_any([ticket])  # which sleeps between two looks: the other lane may need this core
        try:
            return ticket.result()
        except LaneError:
            return Failure(traceback.format_exc(), gpu_refuses())


if __name__ == "__main__":
    run_child(serve)
