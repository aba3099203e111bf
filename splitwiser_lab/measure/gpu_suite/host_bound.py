"""The paper's regime: eager Hugging Face, bound by its host, against itself in N processes, with and without MPS.

N whole processes with a model each, N times the work: what is gained is gaps of the host filled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import torch

from splitwiser_lab.lanes.child import environment
from splitwiser_lab.measure.gpu_suite.job import Job, over, summary

_START_SECONDS = 120.0


class EagerProcess:
    """A process with a model of its own, which generates when told to."""

    def __init__(self, settings: dict[str, Any], around: dict[str, str]) -> None:
        """Start it with `around` on top of our environment; `wait` until it is ready."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "splitwiser_lab.measure.gpu_suite.eager_worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(around),
            text=True,
        )

    def go(self, new_tokens: int) -> None:
        """Begin one batch; returns at once."""
        pipe = _open(self._process.stdin)
        pipe.write(f"{new_tokens}\n")
        pipe.flush()

    def wait(self) -> None:
        """Wait for the answer to `go`, or for the process to be ready. Raises RuntimeError when it died."""
        answer = _open(self._process.stdout).readline().strip()
        if answer != "done":
            raise RuntimeError(f"a process with eager transformers ended: {answer or 'it said nothing'}")

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            _open(pipe).close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def host_bound(job: Job) -> None:
    """Rates of 1, 2, 4 processes by turns, plain and under MPS, as multiples of one process."""
    plan = job.plan
    settings = {
        "model": job.model,
        "device": job.device,
        "dtype": job.dtype,
        "batch": plan.host_batch,
        "prompt": plan.host_prompt,
    }
    most = max(plan.host_processes)
    with ExitStack() as stack:
        kinds: dict[str, list[EagerProcess]] = {}
        for kind in ("plain", "MPS"):
            with job.trying(f"processes, {kind}"):
                environment = stack.enter_context(_surroundings(kind, job.device))
                if environment is None:
                    job.skip("processes under MPS", _why_no_mps(job.device))
                    continue
                job.report(f"{job.shape}: starting {most} processes with eager transformers, {kind}")
                processes = [EagerProcess(settings, environment) for _ in range(most)]
                for process in processes:
                    stack.callback(process.close)
                for process in processes:
                    process.wait()
                kinds[kind] = processes
        for new_tokens in plan.host_outputs:
            _by_turns(job, kinds, new_tokens)


def _by_turns(job: Job, kinds: dict[str, list[EagerProcess]], new_tokens: int) -> None:
    cases = [(kind, count) for kind in kinds for count in job.plan.host_processes if kind == "plain" or count > 1]
    samples: dict[tuple[str, int], dict[int, float]] = {case: {} for case in cases}  # by round
    longest = 0.0
    for number in range(job.repeats + 1):  # round 0 warms up
        for kind, count in cases:
            what = f"{count} processes, {kind}, {job.plan.host_prompt}→{new_tokens}, round {number}"
            if not job.time_for(what, longest):
                continue
            job.report(f"{job.shape}: {what}")
            with job.trying(what):
                begun = time.perf_counter()
                for process in kinds[kind][:count]:
                    process.go(new_tokens)
                for process in kinds[kind][:count]:
                    process.wait()
                seconds = time.perf_counter() - begun
                longest = max(longest, 1.2 * seconds)
                if number:
                    samples[kind, count][number] = count * job.plan.host_batch * new_tokens / seconds
    alone = samples.get(("plain", 1), {})
    for (kind, count), rates in samples.items():
        if rates:
            ratios = over(rates, alone)
            job.add(
                processes=count,
                sharing=kind,
                batch=job.plan.host_batch,
                prompt=job.plan.host_prompt,
                output=new_tokens,
                output_tok_s=summary(list(rates.values())),
                over_one_process=summary(ratios) if ratios else None,
            )


@contextmanager
def _surroundings(kind: str, device: str) -> Iterator[dict[str, str] | None]:
    """What the processes need in their environment; None where there is no MPS. The daemon ends with the block."""
    if kind == "plain":
        yield {}
        return
    if _why_no_mps(device) is not None:
        yield None
        return
    from splitwiser_lab.lanes.mps import MpsShare
    from splitwiser_lab.lanes.support import daemon_of, index_of

    share = MpsShare(daemon_of(index_of(torch.device(device))), 100)
    try:
        yield share.enter()
    finally:
        share.leave()


def _why_no_mps(device: str) -> str | None:
    from splitwiser_lab.lanes.support import why_not

    return why_not("mps", device)


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
