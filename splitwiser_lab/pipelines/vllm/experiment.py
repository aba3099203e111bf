"""The paper's vLLM experiment as plain data: two scales, and every knob."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.arrivals import Rate
from splitwiser_lab.pipelines.experiment import Scale
from splitwiser_lab.pipelines.vllm.placement import VllmPlacement
from splitwiser_lab.pipelines.vllm.settings import EngineSettings

_REFERENCE_BATCH = 32


@dataclass(frozen=True)
class VllmExperiment:
    """What `reproduce_vllm` runs: requests of one length, greedy, in each placement.

    They come all at once, and then, once more for each of `rates`, one by one. `settings` are those of every engine.
    """

    model: str
    input: int
    outputs: tuple[int, ...]
    requests: int
    placements: tuple[VllmPlacement, ...]
    batch: int = _REFERENCE_BATCH  # prompts that transformers' `generate`, the reference, takes at once
    dtype: str = "auto"
    seed: int = 0
    rates: tuple[Rate, ...] = ()
    settings: EngineSettings = field(default_factory=EngineSettings)
    warm_up_requests: int | None = None  # all: a GPU's kernels are chosen and loaded when a size first comes

    def workload(self, output: int) -> Workload:
        """Random prompts, the same for every placement and output length."""
        return Workload.closed(self.requests, self.input, output, self.seed)

    def warm_up(self, output: int, processes: int) -> Workload:
        """The first of these requests: `warm_up_requests` for each of so many engines, None: all."""
        whole = self.workload(output)
        return whole if self.warm_up_requests is None else whole.head(self.warm_up_requests * processes)

    def with_knobs(
        self,
        modes: Sequence[str] = (),
        processes: Sequence[int] = (),
        mps: bool | None = None,
        sm_shares: Sequence[int] | None = None,
        **knobs: Any,
    ) -> VllmExperiment:
        """This experiment with what was chosen by hand; what is None or empty stays as it is.

        `processes` are numbers of engines. One engine with whole prompts always runs, as what the others are
        compared with. Raises ModeError for a placement that makes no sense, WorkloadError for a number that is
        none.
        """
        given = {name: knob for name, knob in knobs.items() if knob is not None}
        numbers = [(name, given[name]) for name in ("batch", "input", "requests") if name in given]
        for name, value in [*numbers, *(("output", output) for output in given.get("outputs", ()))]:
            if value < 1:
                raise WorkloadError(f"{name}={value}: give a whole number, 1 or more.")
        as_chosen = {p.mode for p in self.placements if p.mps == mps}  # the others run with MPS as chosen, too
        kept = [p for p in self.placements if not modes or p.mode in modes]
        kept = [p for p in kept if p.mps == mps or p.mode not in as_chosen or p.mode == "sequential"]
        named = [VllmPlacement.of(mode) for mode in modes if mode not in {p.mode for p in self.placements}]
        chosen = []
        for p in [*kept, *named]:
            counts = processes if processes and p.mode != "sequential" else (p.engines,)
            for count in counts:
                if p.mode == "sequential":
                    chosen.append(p)
                    continue
                under = p.mps if mps is None and not sm_shares else (True if mps is None else mps)
                shares = sm_shares or (p.sm_shares if p.mps and under and count == p.engines else None)
                chosen.append(VllmPlacement.of(p.mode, count, p.chunk_tokens, p.connector, under, shares))
        return replace(self, placements=tuple(dict.fromkeys((VllmPlacement.of("sequential"), *chosen))), **given)


def _side_by_side(mps: bool) -> tuple[VllmPlacement, ...]:
    """N engines, and the split, without shares of the SMs."""
    replicas = [VllmPlacement.of("replicas", count, mps=mps) for count in (2, 4)]
    connectors = ("shared",) if mps else ("shared", "example")  # files are as slow under MPS
    return (*replicas, *(VllmPlacement.of("split", 2, connector=name, mps=mps) for name in connectors))


def _paper() -> tuple[VllmPlacement, ...]:
    one = (VllmPlacement.of("sequential"), VllmPlacement.of("sequential", chunk_tokens=512))
    shared = (  # shares that compute right on an H200, see `model/products.py`; together they may be more than all
        VllmPlacement.of("replicas", 2, mps=True, sm_shares=(50, 50)),
        VllmPlacement.of("split", 2, connector="shared", mps=True, sm_shares=(90, 25)),
    )
    return (*one, *_side_by_side(False), *_side_by_side(True), *shared)


def _small() -> tuple[VllmPlacement, ...]:
    return (
        VllmPlacement.of("sequential"),
        VllmPlacement.of("sequential", chunk_tokens=128),
        VllmPlacement.of("replicas", 2),
        VllmPlacement.of("split", 2, connector="shared"),
        VllmPlacement.of("split", 2, connector="example"),
    )


# `paper`: the paper's N engines on work that lasts seconds on today's GPUs; run llama-3.2-1b-shape by --model, too.
VLLM_EXPERIMENTS: dict[Scale, VllmExperiment] = {
    "small": VllmExperiment("smollm2-135m", 128, (24,), 8, _small(), batch=8, warm_up_requests=2),
    "paper": VllmExperiment("opt-125m-shape", 1024, (128,), 128, _paper()),
}
