"""The other end of a process lane: map weights and pool, then run batches until the pipe closes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from splitwiser_lab.lanes.process import WorkerSetup


def main(fd: int) -> None:
    """Serve batches arriving on the socket `fd`. Every answer is a BatchResult, or an error as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    with Connection(fd) as connection, contextlib.suppress(EOFError, ConnectionError):
        setup: WorkerSetup = connection.recv()
        _serve(connection, setup)


def _serve(connection: Connection, setup: WorkerSetup) -> None:
    import torch

    from splitwiser_lab.lanes.inline import run_timed
    from splitwiser_lab.model.kv_pool import KVPool
    from splitwiser_lab.model.transformer import Transformer
    from splitwiser_lab.model.weights import Weights

    dtype = getattr(torch, setup.dtype)
    weights = Weights(setup.config, dtype, "cpu", setup.weights_fd, setup.packed)
    pool = KVPool(setup.config, dtype, "cpu", setup.pages, setup.page_size, buffer_fd=setup.pool_fd)
    transformer = Transformer(weights, pool)
    connection.send(None)  # ready
    current: list[int] = []
    while True:
        cores, batch = connection.recv()
        try:
            if cores != current:
                torch.set_num_threads(len(cores))
                pin(cores)
                current = cores
            connection.send(run_timed(transformer, batch))
        except Exception:
            connection.send(traceback.format_exc())


def pin(cores: list[int]) -> None:
    """Keep every thread of this process on `cores`, where the system can (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # there is nothing to tidy up, and PyTorch would take a second over it
