"""How the work of a pipeline is spread over processes: the mode, and what each process may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch

from splitwiser_lab.errors import ModeError
from splitwiser_lab.hardware import cores
from splitwiser_lab.lanes.support import LaneKind, index_of, why_not
from splitwiser_lab.pipelines.messages import Work

PipelineMode = Literal["sequential", "replicas", "split"]


@dataclass(frozen=True)
class Role:
    """One worker process: its name, what it does, and its percentage of the SMs under MPS (None: no MPS)."""

    name: str
    work: Work
    sm_share: int | None


@dataclass(frozen=True)
class Placement:
    """A mode with its options.

    sequential  one process, batches one after the other
    replicas    N data-parallel processes, each with its shard of the requests
    split       one process prefills, N - 1 decode; keys and values are handed over
    """

    mode: PipelineMode
    processes: int
    mps: bool
    sm_shares: tuple[int, ...]

    @classmethod
    def of(
        cls, mode: str, processes: int | None = None, mps: bool = False, sm_shares: Sequence[int] | None = None
    ) -> Placement:
        """Check a mode and its options; `sm_shares` are percentages of the SMs, one a process. Raises ModeError."""
        if mode not in get_args(PipelineMode):
            raise ModeError(f"the Hugging Face pipeline has no mode {mode!r}: use {', '.join(get_args(PipelineMode))}.")
        count = {"sequential": 1, "replicas": 2, "split": 2}[mode] if processes is None else processes
        if not isinstance(count, int) or count < 1:
            raise ModeError(f"processes={processes!r}: give a whole number of processes, 1 or more.")
        if mode == "sequential" and count != 1:
            raise ModeError(f"sequential runs in one process, not {count}: use mode 'replicas' or 'split'.")
        if mode == "split" and count < 2:
            raise ModeError("split needs 2 processes or more: one that prefills, the others decode.")
        if sm_shares is not None and not mps:
            raise ModeError("sm_shares divide the SMs between clients of MPS: add mps=True.")
        shares = tuple(sm_shares) if sm_shares is not None else (100,) * count
        if len(shares) != count or not all(isinstance(share, int) and 1 <= share <= 100 for share in shares):
            raise ModeError(f"sm_shares={shares}: give {count} percentages from 1 to 100, one for each process.")
        return cls(mode, count, mps, shares)  # type: ignore[arg-type]

    def check(self, device: str) -> None:
        """Raise ModeError when `device` cannot run it."""
        kind: LaneKind = "mps" if self.mps else "process"
        if reason := why_not(kind, device):
            what = "mps=True" if self.mps else "the Hugging Face pipeline"
            raise ModeError(f"{what} cannot run on {device}: {reason}.")

    @property
    def roles(self) -> list[Role]:
        """The processes, prefill first."""
        names: list[tuple[str, Work]] = [(f"process {number}", "both") for number in range(self.processes)]
        if self.mode == "split":
            decode = ["decode"] if self.processes == 2 else [f"decode {n}" for n in range(self.processes - 1)]
            names = [("prefill", "prefill"), *((name, "decode") for name in decode)]
        shares = self.sm_shares if self.mps else (None,) * self.processes
        return [Role(name, work, share) for (name, work), share in zip(names, shares, strict=True)]

    def cores(self) -> list[list[int]]:
        """The CPU cores of each process: equal shares; where there are more processes than cores, they take turns."""
        available = cores()
        if self.processes >= len(available):
            return [[available[number % len(available)]] for number in range(self.processes)]
        ends = [round(len(available) * number / self.processes) for number in range(self.processes + 1)]
        return [available[start:end] for start, end in pairwise(ends)]

    def __str__(self) -> str:
        shares = f" {'/'.join(map(str, self.sm_shares))} %" if any(share != 100 for share in self.sm_shares) else ""
        mps = f", MPS{shares}" if self.mps else ""
        return f"{self.mode}{'' if self.mode == 'sequential' else f' × {self.processes}'}{mps}"


def device_of_child(device: str, mps: bool) -> str:
    """What `device` is called in a child: an MPS client sees only the GPU of its daemon."""
    where = torch.device(device)
    if where.type == "cpu":
        return "cpu"
    return f"cuda:{0 if mps else index_of(where)}"
