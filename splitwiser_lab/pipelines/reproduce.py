"""The paper's Hugging Face experiment, run again: every placement on the same work, interleaved, tokens checked.

Beside the pipeline run transformers' own `generate`, in this process, and this package's engine with the
same limit of requests at once. Each keeps its processes between the rounds, so a round measures no start.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from splitwiser_lab.errors import ModeError, ModelError, RequestError
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.budget import Budget
from splitwiser_lab.pipelines.document import Reproduction
from splitwiser_lab.pipelines.experiment import Experiment
from splitwiser_lab.pipelines.huggingface import HuggingFacePipeline
from splitwiser_lab.pipelines.memory import private_bytes, settled_free_bytes
from splitwiser_lab.pipelines.phase_figures import PhaseFigures
from splitwiser_lab.pipelines.placement import Placement
from splitwiser_lab.pipelines.result import PipelineResult
from splitwiser_lab.pipelines.rows import Work
from splitwiser_lab.pipelines.runners import GenerateRunner, Runner, engine_runners
from splitwiser_lab.pipelines.turns import Turns


def reproduce(
    experiment: Experiment,
    *,
    device: str = "auto",
    repeats: int = 3,
    engine: bool = True,
    skip: bool = True,
    phase_seconds: float = 1.0,
    start_together: bool = False,
    budget: Budget | None = None,
    keep: Callable[[Reproduction], None] = lambda _: None,
    report: Callable[[str], None] = lambda _: None,
) -> Reproduction:
    """Run `experiment`: each output length, each placement, `repeats` times by turns after a warm-up of each.

    With `skip`, placements that this machine cannot run are left out, with the reason; else they raise ModeError.
    One that does not start or fails is left out in any case, and so is what the `budget` has no time for.
    `keep` is given what there is after each measurement, and before an error or an interrupt is raised.

    `engine`: also run this package's engine. `phase_seconds`: how long each phase is first watched alone.
    `start_together`: start all processes side by side, see `Turns`. `report` is told what happens next.
    """
    if repeats < 1:
        raise RequestError(f"repeats={repeats}: measure at least once, better three times.")
    with ExitStack() as stack:
        report(f"loading {experiment.model}")
        first = stack.enter_context(HuggingFacePipeline.from_pretrained(experiment.model, device, experiment.dtype))
        judge = Reference(first.model())
        phases = _phases_alone(first, experiment, phase_seconds, report)
        runners: dict[str, Runner] = {"generate": GenerateRunner(judge.model, experiment.batch)}
        skipped: dict[str, str] = {}
        for placement in experiment.placements:
            try:
                runners[str(placement)] = _Placed(stack, first, placement, experiment)
            except ModeError as error:
                if not skip:
                    raise
                skipped[str(placement)] = str(error)
        dtype = str(first.layout.dtype).removeprefix("torch.")
        if engine:
            try:
                longest = experiment.input + max(experiment.outputs)
                runners.update(engine_runners(stack, experiment.model, first.device, dtype, experiment.batch, longest))
            except ModelError as error:
                skipped["engine"] = str(error)
        budget = budget or Budget()
        turns = Turns(runners, experiment, judge, skipped, report, start_together=start_together, budget=budget)
        work, origin = _work(first, experiment), provenance(first.device)

        def found() -> Reproduction:
            return Reproduction("hf", work, turns.rows, dict(skipped), origin, phases, left_out=turns.left_out)

        turns.run(experiment.outputs, repeats, lambda: keep(found()))
        return found()


def reproduce_phases(
    experiment: Experiment,
    *,
    device: str = "auto",
    phase_seconds: float = 1.0,
    report: Callable[[str], None] = lambda _: None,
) -> Reproduction:
    """Only watch each phase alone, for `phase_seconds` (0: one pass of each, which is what a profiler wants)."""
    report(f"loading {experiment.model}")
    with HuggingFacePipeline.from_pretrained(experiment.model, device, experiment.dtype) as first:
        phases = _phases_alone(first, experiment, phase_seconds, report)
        return Reproduction("hf", _work(first, experiment), (), {}, provenance(first.device), phases)


def _work(first: HuggingFacePipeline, e: Experiment) -> Work:
    dtype = str(first.layout.dtype).removeprefix("torch.")
    return Work(e.model, first.random_weights, dtype, e.batch, e.input, e.requests, e.seed)


def _phases_alone(
    first: HuggingFacePipeline, e: Experiment, seconds: float, report: Callable[[str], None]
) -> tuple[PhaseFigures, ...]:
    """Both phases of the first batch; none where there is nothing to decode."""
    output = max(e.outputs)
    if output < 2:
        return ()
    report("watching each phase alone")
    return first.profile(e.workload(output), e.batch, seconds)


class _Placed:
    """The pipeline in one placement, with processes of its own, over the weights of `first`."""

    def __init__(self, stack: ExitStack, first: HuggingFacePipeline, placement: Placement, e: Experiment) -> None:
        shares = placement.sm_shares if placement.mps else None
        made = first.beside(placement.mode, placement.processes, placement.mps, sm_shares=shares)
        self._pipeline, self._batch = stack.enter_context(made), e.batch
        self._start: dict[str, float | None] = {}  # what the last start cost, which was in a warm-up

    def launch(self, workload: Workload) -> None:
        """Start its processes and do not wait; what a start costs is not known then."""
        self._pipeline.launch(workload, self._batch)

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        free = 0 if self._pipeline.pids else settled_free_bytes(self._pipeline.device)
        result: PipelineResult = self._pipeline.run(workload, self._batch)
        if result.spawn_s:
            held = private_bytes(self._pipeline.pids.values(), self._pipeline.device, free)
            self._start = {"spawn_s": max(result.spawn_s), "private_gb": None if held is None else held / 1e9}
        return {**result.figures(), **self._start}, result.tokens
