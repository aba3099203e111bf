"""Which worker gets which batch next. A mode is a policy here and nothing more; the loop is the same for all."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from splitwiser_lab.pipelines.messages import Done, Job, Prefilled, Released, Report
from splitwiser_lab.pipelines.phases import PromptBatch
from splitwiser_lab.pipelines.placement import Placement
from splitwiser_lab.pipelines.team import SLOTS, Team

Listener = Callable[[str, PromptBatch, Report], None]


class Policy(Protocol):
    """Knows which batches are left."""

    def next_job(self, worker: str, now: float) -> Job | None:
        """The next job of an idle worker, `now` seconds after the start; None when it has to wait."""
        ...

    def take(self, job: Job, report: Report) -> None:
        """Hear what became of a job."""
        ...


class Shards:
    """Each worker has batches of its own and takes them through both phases, one after the other."""

    def __init__(self, shards: dict[str, Sequence[PromptBatch]]) -> None:
        self._left = {name: deque(batches) for name, batches in shards.items()}

    def next_job(self, worker: str, now: float) -> Job | None:
        left = self._left[worker]
        return Job(left.popleft(), "both") if left and left[0].due <= now else None

    def take(self, job: Job, report: Report) -> None:
        """Nothing depends on it."""


class Stages:
    """The staggered pipeline of the paper's figure: batch k + 1 is prefilled while batch k is decoded."""

    def __init__(self, batches: Sequence[PromptBatch]) -> None:
        self._left = deque(batches)
        self._free = deque(range(SLOTS))
        self._ready: deque[Job] = deque()

    def next_job(self, worker: str, now: float) -> Job | None:
        if worker != "prefill":
            return self._ready.popleft() if self._ready else None
        if not self._left or not self._free or self._left[0].due > now:
            return None
        return Job(self._left.popleft(), "prefill", self._free.popleft())

    def take(self, job: Job, report: Report) -> None:
        if isinstance(report, Released):
            self._free.append(job.slot)
        elif isinstance(report, Prefilled) and report.stored is None:
            self._free.append(job.slot)  # every row ended with its first token
        elif isinstance(report, Prefilled):
            first = tuple(token or 0 for token in report.step.tokens)
            self._ready.append(Job(job.batch, "decode", job.slot, report.stored, first))


def policy_of(placement: Placement, shards: Sequence[Sequence[PromptBatch]]) -> Policy:
    """The policy of a mode over the batches of each shard; only replicas have more than one shard."""
    if placement.mode == "split":
        return Stages(shards[0])
    names = [role.name for role in placement.roles]
    return Shards(dict(zip(names, shards, strict=True)))


def drive(team: Team, policy: Policy, batches: Sequence[PromptBatch], listen: Listener, origin: float) -> None:
    """Give out jobs and pass on reports until all `batches` have ended. `origin`: `time.perf_counter` at the start."""
    names = list(team.pids)
    under_way: dict[str, Job] = {}
    unfinished = {batch.number for batch in batches}
    while unfinished or under_way:
        now = time.perf_counter() - origin
        for name in names:
            if name not in under_way and (job := policy.next_job(name, now)):
                under_way[name] = job
                team.send(name, job)
        due = [batch.due for batch in batches if batch.due > now]
        assert under_way or due, f"batches {sorted(unfinished)} are left but no process can run them"
        for name, report in team.wait(min(due) - now if due else None):
            job = under_way[name]
            policy.take(job, report)
            listen(name, job.batch, report)
            if isinstance(report, Done):
                del under_way[name]
            ended = isinstance(report, Done) and job.work != "prefill"
            if ended or (isinstance(report, Prefilled) and job.work == "prefill" and report.stored is None):
                unfinished.discard(job.batch.number)
