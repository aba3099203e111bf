"""The paper's vLLM experiment, run again: every placement on the same work, interleaved, tokens checked.

Beside the pipeline run transformers' `generate`, vLLM as it comes (on a GPU) and this package's engine. All have the
same weights: those of a shape are drawn once and written to a folder that lives as long as the run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from splitwiser_lab.errors import ModeError, ModelError, RequestError
from splitwiser_lab.hardware import choose_device
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.budget import Budget
from splitwiser_lab.pipelines.document import NOT_RUN, Reproduction
from splitwiser_lab.pipelines.memory import private_bytes, settled_free_bytes
from splitwiser_lab.pipelines.rows import Work
from splitwiser_lab.pipelines.runners import GenerateRunner, Runner, engine_runners
from splitwiser_lab.pipelines.source import SourceModel, load_source
from splitwiser_lab.pipelines.turns import Turns
from splitwiser_lab.pipelines.vllm.experiment import VllmExperiment
from splitwiser_lab.pipelines.vllm.pipeline import VllmPipeline
from splitwiser_lab.pipelines.vllm.placement import VllmPlacement
from splitwiser_lab.pipelines.vllm.settings import EngineSettings
from splitwiser_lab.pipelines.vllm.shipped import SHIPPED, ShippedRunner


def reproduce_vllm(
    experiment: VllmExperiment,
    *,
    device: str = "auto",
    repeats: int = 3,
    engine: bool = True,
    skip: bool = True,
    start_together: bool = False,
    budget: Budget | None = None,
    keep: Callable[[Reproduction], None] = lambda _: None,
    report: Callable[[str], None] = lambda _: None,
    vllm_python: str | None = None,
) -> Reproduction:
    """Run `experiment`: each output length, each placement, `repeats` times by turns after a warm-up of each.

    All requests at once, then one by one at each of the experiment's rates, in the same engines.

    With `skip`, placements that this machine cannot run are left out, with the reason; else they raise ModeError.
    One that does not start or fails is left out in any case, and so is what the `budget` has no time for.
    `keep` is given what there is after each measurement, and before an error or an interrupt is raised.
    `engine`: also run this package's engine. `start_together`: start all engines side by side, see `Turns`.
    `vllm_python`: the Python of an environment with vLLM. `report` is told what happens next. Raises ModeError
    without a vLLM that this pipeline knows.
    """
    if repeats < 1:
        raise RequestError(f"repeats={repeats}: measure at least once, better three times.")
    with ExitStack() as stack:
        report(f"loading {experiment.model}")
        where = choose_device(device).value
        source = load_source(experiment.model, where, experiment.dtype)
        judge = Reference(source.model)
        folder = _written(stack, source) if source.random_weights else experiment.model
        dtype = str(source.model.dtype).removeprefix("torch.")
        settings = experiment.settings
        first = stack.enter_context(
            VllmPipeline.from_pretrained(
                folder,
                where,
                dtype,
                eager=settings.eager,
                max_batch=settings.max_batch,
                vllm_python=vllm_python,
            )
        )
        runners: dict[str, Runner] = {"generate": GenerateRunner(judge.model, experiment.batch)}
        skipped: dict[str, str] = {}
        for placement in experiment.placements:
            try:
                runners[str(placement)] = _Placed(stack, first, placement, experiment)
            except ModeError as error:
                if not skip:
                    raise
                skipped[str(placement)] = str(error)
        if torch.device(where).type == "cuda" and settings == EngineSettings():  # on a CPU: see `bench`
            most = experiment.workload(max(experiment.outputs))
            shipped = ShippedRunner(lambda: first.shipped(most), source.model)
            stack.callback(shipped.close)
            runners[SHIPPED] = shipped
        if engine:
            try:
                longest = experiment.input + max(experiment.outputs)
                at_once = settings.at_once(experiment.requests)
                runners.update(engine_runners(stack, experiment.model, where, dtype, at_once, longest))
            except ModelError as error:
                skipped["engine"] = str(error)
        budget = budget or Budget()
        turns = Turns(runners, experiment, judge, skipped, report, experiment.rates, start_together, budget)
        work, origin = _work(experiment, source, dtype), provenance(where)

        def found() -> Reproduction:
            versions = {**origin["versions"], "vllm": _version(runners)}
            told = {**origin, "versions": versions}
            return Reproduction("vllm", work, turns.rows, dict(skipped), told, left_out=turns.left_out)

        turns.run(experiment.outputs, repeats, lambda: keep(found()))
        return found()


class _Placed:
    """vLLM in one placement, with engines of its own that start once, for the longest outputs."""

    def __init__(
        self, stack: ExitStack, first: VllmPipeline, placement: VllmPlacement, experiment: VllmExperiment
    ) -> None:
        shares = placement.sm_shares if placement.mps else None
        made = first.beside(
            placement.mode,
            placement.engines,
            chunk_tokens=placement.chunk_tokens,
            connector=placement.connector,
            mps=placement.mps,
            sm_shares=shares,
        )
        self._pipeline = stack.enter_context(made)
        self._most = experiment.workload(max(experiment.outputs))
        self._start: dict[str, float | None] = {}  # what the last start cost, where it was the only one
        self._launched = False
        self.version = ""

    def launch(self, workload: Workload) -> None:
        """Start its engines and do not wait; what a start costs is not known then."""
        self._pipeline.launch(self._most)
        self._launched = True

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        starting, self._launched = not (self._pipeline.pids or self._launched), False
        free = settled_free_bytes(self._pipeline.device) if starting else 0
        if starting:
            self._pipeline.start(self._most)
        result = self._pipeline.run(workload)
        if starting:
            held = private_bytes(self._pipeline.pids.values(), self._pipeline.device, free)
            private = None if held is None else held / 1e9
            self._start = {"spawn_s": max(self._pipeline.spawn_s), "private_gb": private}
        self.version = result.engines[0].version
        return {**result.figures(), **self._start}, result.tokens


def _written(stack: ExitStack, source: SourceModel) -> str:
    """A folder with a model's weights as safetensors, until the stack ends."""
    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="splitwiser-shape-"))
    folder = Path(scratch, source.name)  # named as the model: what vLLM compiles is kept by this name
    source.model.save_pretrained(folder)
    return str(folder)


def _work(e: VllmExperiment, source: SourceModel, dtype: str) -> Work:
    settings = e.settings
    return Work(
        e.model,
        source.random_weights,
        dtype,
        e.requests,
        e.input,
        e.requests,
        e.seed,
        settings.eager,
        settings.max_batch,
    )


def _version(runners: dict[str, Runner]) -> str:
    """vLLM's, once an engine has run."""
    known = (runner.version for runner in runners.values() if isinstance(runner, _Placed) and runner.version)
    return next(known, NOT_RUN)
