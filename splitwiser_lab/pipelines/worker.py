"""A worker process of the Hugging Face pipeline: map the weights, then do jobs until the pipe closes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from splitwiser_lab.errors import HardwareError
from splitwiser_lab.lanes.child import Failure, compute_on, gpu_refuses, run_child

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from splitwiser_lab.pipelines.messages import Job, Report, Setup
    from splitwiser_lab.pipelines.phases import Step


def serve(connection: Connection) -> None:
    """Answer a Setup with None, and each Job with its reports, Done the last; a Failure instead where it fails."""
    setup: Setup = connection.recv()
    try:
        worker = Worker(setup)
    except HardwareError as error:  # it says all that there is to say
        connection.send(Failure(str(error), fatal=True))
        return
    except Exception:
        connection.send(Failure(traceback.format_exc(), fatal=True))
        return
    connection.send(None)  # ready
    while True:
        job = connection.recv()
        try:
            for report in worker.run(job):
                if report is not None:
                    connection.send(report)
                elif connection.poll():  # during a job the parent has nothing to say: it has let go
                    return
        except Exception:
            fatal = gpu_refuses()
            connection.send(Failure(traceback.format_exc(), fatal))
            if fatal:
                return


class Worker:
    """The model of this process, and its view of the slots."""

    def __init__(self, setup: Setup) -> None:
        import torch

        from splitwiser_lab.cuda_driver import mps_enabled
        from splitwiser_lab.pipelines.phases import Phases
        from splitwiser_lab.shared_memory import attach

        compute_on(setup.cores)
        device = torch.device(setup.device)
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.set_device(device)
        if setup.mps_share is not None and not mps_enabled(device.index or 0):
            raise RuntimeError("CUDA started here without the MPS daemon, which would be another experiment")
        self._layout, slots = setup.layout, setup.slots
        self._phases = Phases(setup.skeleton.fill(setup.device))
        check_part(self._phases.model, setup.mps_share, device)
        self._slot_bytes = slots.slot_bytes if slots else 0
        self._slots = attach(slots.handle, slots.count * slots.slot_bytes, setup.device) if slots else None

    def run(self, job: Job) -> Iterator[Report | None]:
        """Do a job, reporting what others wait for as it happens; None between two steps, to look around."""
        from splitwiser_lab.pipelines.kv import view
        from splitwiser_lab.pipelines.messages import Done, Released

        batch, first = job.batch, list(job.first)
        if job.work == "decode":
            assert self._slots is not None and job.stored is not None
            config = self._phases.model.config
            cache = view(job.stored, self._layout, config, self._slots, job.slot * self._slot_bytes)
        else:
            prefilled, first, cache = self._prefill(job)
            yield prefilled
        steps: list[Step] = []
        for step in self._phases.decode(batch, cache, first) if job.work != "prefill" else ():
            if job.work == "decode" and not steps:
                yield Released()  # this step has copied the keys and values
            steps.append(step)
            yield None
        yield Done(steps)

    def _prefill(self, job: Job) -> tuple[Report, list[int], object]:
        from splitwiser_lab.pipelines.kv import store
        from splitwiser_lab.pipelines.messages import Prefilled
        from splitwiser_lab.pipelines.phases import Rows, Step

        start = time.perf_counter()
        tokens, cache = self._phases.prefill(job.batch)
        first = tokens.tolist()  # waits for the device
        rows = Rows(job.batch)
        step = Step(start, time.perf_counter(), rows.take(first))
        if job.work == "both" or rows.over:
            return Prefilled(step), first, cache
        assert self._slots is not None
        stored = store(cache, self._slots, job.slot * self._slot_bytes)
        self._synchronize()
        return Prefilled(step, stored, (step.end, time.perf_counter())), first, cache

    def _synchronize(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()


def check_part(model: PreTrainedModel, share: int | None, device: torch.device) -> None:
    """Raise HardwareError where `share` percent of a GPU's SMs multiply wrongly with this model's weights.

    All of them (100), or the GPU without MPS (None), are taken to be right.
    """
    import torch

    from splitwiser_lab.model.products import ANOTHER_PART, check_products, part_under_mps
    from splitwiser_lab.pipelines.multiplied import multiplied

    if share is not None and share != 100:
        check_products(multiplied(model), part_under_mps(share, device), ANOTHER_PART)
        torch.cuda.empty_cache()  # what this process holds is measured


if __name__ == "__main__":
    run_child(serve)
