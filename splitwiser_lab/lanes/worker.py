"""The other end of a process lane: map weights and pool, then run batches until the pipe closes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from splitwiser_lab.lanes.process import Failure, WorkerSetup
from splitwiser_lab.lanes.wire import Receiver

if TYPE_CHECKING:
    from splitwiser_lab.lanes.base import Lane

_NO_DAEMON = 75  # exit code, as sysexits.h has it: what was needed is gone for now


def main(fd: int, lifeline: int | None = None) -> None:
    """Serve batches arriving on the socket `fd`. Every answer is a BatchResult or a Failure.

    Under MPS, end as soon as `lifeline` closes: a client of a dead daemon may wait for its GPU for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    if lifeline is not None:
        threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    with Connection(fd) as connection, contextlib.suppress(EOFError, ConnectionError):
        setup: WorkerSetup = connection.recv()
        try:
            lane = _lane(setup)
        except Exception:
            connection.send(Failure(traceback.format_exc(), fatal=True))
            return
        connection.send(None)  # ready
        _serve(connection, lane)


def _lane(setup: WorkerSetup) -> Lane:
    """The lane in which this process runs its batches, over the parent's memory."""
    import torch

    from splitwiser_lab.cuda_driver import mps_enabled
    from splitwiser_lab.lanes.device import DeviceLane
    from splitwiser_lab.lanes.inline import InlineLane
    from splitwiser_lab.model.kv_pool import KVPool
    from splitwiser_lab.model.transformer import Transformer
    from splitwiser_lab.model.weights import Weights

    dtype = getattr(torch, setup.dtype)
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if setup.under_mps and not mps_enabled(device.index):
        raise RuntimeError("CUDA started here without the MPS daemon, which would be another mode")
    weights = Weights(setup.config, dtype, setup.device, setup.weights, setup.packed)
    pool = KVPool(setup.config, dtype, setup.device, setup.pages, setup.page_size, setup.pool)
    transformer = Transformer(weights, pool)
    if device.type == "cpu":
        return InlineLane(setup.lane, transformer)
    lane = DeviceLane(setup.lane, transformer, torch.cuda.Stream(device))
    lane.start()
    return lane


def _serve(connection: Connection, lane: Lane) -> None:
    import torch

    receiver = Receiver()
    current: list[int] | None = None
    while True:
        cores, packed = connection.recv()
        batch = receiver.unpack(packed)
        try:
            if cores != current:
                torch.set_num_threads(len(cores))
                pin(cores)
                current = cores
            connection.send(lane.submit(batch).result())
        except Exception:
            fatal = _gpu_refuses()
            connection.send(Failure(traceback.format_exc(), fatal))
            if fatal:
                return  # the lane starts another process for its next batch


def _gpu_refuses() -> bool:
    """Whether the error has cost this process its GPU: after most kinds, every later call fails too."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)  # nobody writes: it returns when the last who could is gone
    os._exit(_NO_DAEMON)


def pin(cores: list[int]) -> None:
    """Keep every thread of this process on `cores`, where the system can (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:3]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # there is nothing to tidy up, and PyTorch would take a second over it
