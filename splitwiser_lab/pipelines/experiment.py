"""The paper's Hugging Face experiment as plain data: two scales, and every knob."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.placement import Placement

Scale = Literal["small", "paper"]


@dataclass(frozen=True)
class Experiment:
    """What `reproduce` runs: closed-loop requests of one length, in fixed batches, greedy, in each placement."""

    model: str
    batch: int
    input: int
    outputs: tuple[int, ...]
    requests: int
    placements: tuple[Placement, ...]
    dtype: str = "auto"
    seed: int = 0

    def workload(self, output: int) -> Workload:
        """Random prompts, the same for every placement and output length."""
        return Workload.closed(self.requests, self.input, output, self.seed)

    def warm_up(self, output: int, processes: int) -> Workload:
        """The first of these requests: a batch for each of so many processes."""
        return self.workload(output).head(self.batch * processes)

    def with_knobs(
        self,
        modes: Sequence[str] = (),
        processes: Sequence[int] = (),
        mps: bool | None = None,
        sm_shares: Sequence[int] | None = None,
        **knobs: Any,
    ) -> Experiment:
        """This experiment with what was chosen by hand; what is None or empty stays as it is.

        Placements are all combinations of modes, numbers of processes, and MPS off or on; sequential always
        runs, as what the others are compared with. Raises ModeError for one that makes no sense.
        """
        given = {name: knob for name, knob in knobs.items() if knob is not None}
        numbers = [(name, given[name]) for name in ("batch", "input", "requests") if name in given]
        for name, value in [*numbers, *(("output", output) for output in given.get("outputs", ()))]:
            if value < 1:
                raise WorkloadError(f"{name}={value}: give a whole number, 1 or more.")
        if sm_shares and mps is None:
            mps = True
        own = self.placements
        counts = list(processes) or list(dict.fromkeys(p.processes for p in own if p.mode != "sequential"))
        with_mps = [mps] if mps is not None else list(dict.fromkeys(p.mps for p in own))
        chosen = [
            Placement.of(mode, count, under, sm_shares)
            for under in with_mps
            for mode in modes or dict.fromkeys(p.mode for p in own)
            if mode != "sequential"
            for count in counts
        ]
        return replace(self, placements=(Placement.of("sequential"), *dict.fromkeys(chosen)), **given)


def _all_placements() -> tuple[Placement, ...]:
    counted = [(mode, n) for mode in ("replicas", "split") for n in (2, 4, 8)]
    some = [Placement.of(mode, n, mps) for mps in (False, True) for mode, n in counted]
    return (Placement.of("sequential"), *some)


# `paper`: OPT-125M, batches of 20, 1024 tokens in, 12 out (and 128); eight batches, so that 8 processes have one each.
EXPERIMENTS: dict[Scale, Experiment] = {
    "small": Experiment(
        "smollm2-135m", 2, 64, (12,), 8, tuple(Placement.of(mode) for mode in ("sequential", "replicas", "split"))
    ),
    "paper": Experiment("opt-125m-shape", 20, 1024, (12, 128), 160, _all_placements()),
}
