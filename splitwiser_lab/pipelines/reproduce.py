"""The paper's Hugging Face experiment, run again: every placement on the same work, interleaved, tokens checked.

Beside the pipeline run transformers' own `generate`, in this process, and this package's engine with the
same limit of requests at once. Each keeps its processes between the rounds, so a round measures no start.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.errors import HardwareError, ModeError, ModelError, RequestError
from splitwiser_lab.measure.peers import GeneratePeer
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.measure.reference import Reference, TokenCheck
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.document import BASE, Reproduction, Row, Work
from splitwiser_lab.pipelines.experiment import Experiment
from splitwiser_lab.pipelines.huggingface import HuggingFacePipeline
from splitwiser_lab.pipelines.memory import private_bytes, settled_free_bytes
from splitwiser_lab.pipelines.phase_figures import PhaseFigures
from splitwiser_lab.pipelines.placement import Placement
from splitwiser_lab.pipelines.result import PipelineResult

_ENGINE_MODES = {"cpu": ("sequential", "processes"), "cuda": ("sequential", "streams")}


class _Runner(Protocol):
    """A way to do the work: figures and tokens of one round."""

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]: ...


def reproduce(
    experiment: Experiment,
    *,
    device: str = "auto",
    repeats: int = 3,
    engine: bool = True,
    skip: bool = True,
    phase_seconds: float = 1.0,
    report: Callable[[str], None] = lambda _: None,
) -> Reproduction:
    """Run `experiment`: each output length, each placement, `repeats` times by turns after a warm-up of each.

    With `skip`, placements that cannot run here are left out, with the reason; else they raise ModeError.
    `engine`: also run this package's engine. `phase_seconds`: how long each phase is first watched alone.
    `report` is told what happens next.
    """
    if repeats < 1:
        raise RequestError(f"repeats={repeats}: measure at least once, better three times.")
    with ExitStack() as stack:
        report(f"loading {experiment.model}")
        first = stack.enter_context(HuggingFacePipeline.from_pretrained(experiment.model, device, experiment.dtype))
        judge = Reference(first.model())
        phases = _phases_alone(first, experiment, phase_seconds, report)
        runners: dict[str, _Runner] = {"generate": _Generate(judge.model, experiment.batch)}
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
                runners.update(_engines(stack, experiment, first.device, dtype))
            except ModelError as error:
                skipped["engine"] = str(error)
        turns = _Turns(runners, experiment, judge, skipped if skip else None, report)
        rows = tuple(row for output in experiment.outputs for row in turns.rows(output, repeats))
        return Reproduction("hf", _work(first, experiment), rows, skipped, provenance(first.device), phases)


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


@dataclass(frozen=True)
class _Turns:
    """Lets all runners do the same work by turns. What has no room goes to `skipped`; where that is None, it raises."""

    runners: dict[str, _Runner]
    experiment: Experiment
    judge: Reference
    skipped: dict[str, str] | None
    report: Callable[[str], None]

    def rows(self, output: int, repeats: int) -> list[Row]:
        """One row for each runner, with `output` new tokens a request."""
        work = self.experiment.workload(output)
        prompts = _prompts(work, self.judge.model)
        self.report(f"{output} new tokens: asking transformers for the reference's tokens")
        _, expected = self.runners["generate"](work)

        @cache  # most ways and rounds write the same tokens, and to judge a difference takes time
        def check(number: int, ours: tuple[int, ...]) -> TokenCheck:
            return self.judge.check(prompts[number], ours, expected[number])

        rows = {name: self._row(name, output) for name in self.runners if self._warm_up(name, output)}
        for number in range(repeats):
            for name, row in rows.items():
                self.report(f"{output} new tokens: round {number + 1} of {repeats}, {name}")
                figures, tokens = self.runners[name](work)
                row.add(figures)
                row.judge(map(check, range(len(prompts)), map(tuple, tokens)))
            base = rows[BASE].samples["output_throughput"][-1]
            for row in rows.values():
                row.add({"over_sequential": row.samples["output_throughput"][-1] / base})
        return list(rows.values())

    def _placement(self, name: str) -> Placement | None:
        return next((placement for placement in self.experiment.placements if str(placement) == name), None)

    def _row(self, name: str, output: int) -> Row:
        placement = self._placement(name)
        if placement is None:
            return Row(name, output, name.partition(":")[0])
        return Row(name, output, placement.mode, placement.processes, placement.mps)

    def _warm_up(self, name: str, output: int) -> bool:
        """Start and run it once. False when there is no room for it."""
        if name == "generate":
            return True  # the reference's tokens came from it
        self.report(f"{output} new tokens: starting and warming up {name}")
        placement = self._placement(name)
        try:
            self.runners[name](self.experiment.warm_up(output, placement.processes if placement else 1))
        except HardwareError as error:
            if self.skipped is None or name == BASE:
                raise
            self.skipped[f"{name}, {output} new tokens"] = str(error)
            return False
        return True


class _Generate:
    """transformers' `generate` in this process, batch by batch."""

    def __init__(self, model: Any, batch: int) -> None:
        self._peer, self._model, self._batch = GeneratePeer(model), model, batch

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        prompts, new_tokens = _prompts(workload, self._model), workload.arrivals[0].max_new_tokens
        seconds, tokens = 0.0, []
        for start in range(0, len(prompts), self._batch):
            taken, new = self._peer.run(prompts[start : start + self._batch], new_tokens)
            seconds += taken
            tokens += new
        return {"duration": seconds, "output_throughput": sum(map(len, tokens)) / seconds}, tokens


class _Placed:
    """The pipeline in one placement, with processes of its own, over the weights of `first`."""

    def __init__(self, stack: ExitStack, first: HuggingFacePipeline, placement: Placement, e: Experiment) -> None:
        shares = placement.sm_shares if placement.mps else None
        made = first.beside(placement.mode, placement.processes, placement.mps, sm_shares=shares)
        self._pipeline, self._batch = stack.enter_context(made), e.batch
        self._start: dict[str, float | None] = {}  # what the last start cost, which was in a warm-up

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        free = 0 if self._pipeline.pids else settled_free_bytes(self._pipeline.device)
        result: PipelineResult = self._pipeline.run(workload, self._batch)
        if result.spawn_s:
            held = private_bytes(self._pipeline.pids.values(), self._pipeline.device, free)
            self._start = {"spawn_s": max(result.spawn_s), "private_gb": None if held is None else held / 1e9}
        return {**result.figures(), **self._start}, result.tokens


class _Engine:
    """This package's engine in one mode."""

    def __init__(self, engine: Engine, mode: str, batch: int) -> None:
        self._engine, self._mode, self._batch = engine, mode, batch

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        self._engine.set_mode(self._mode, max_batch=self._batch)
        result = self._engine.serve(workload)
        return result.metrics.to_dict(), result.tokens


def _engines(stack: ExitStack, experiment: Experiment, device: str, dtype: str) -> dict[str, _Runner]:
    room = 2 * experiment.batch * (experiment.input + max(experiment.outputs) + 64)
    loaded = Engine.from_pretrained(experiment.model, device=device, dtype=dtype, kv_tokens=room)
    engine = stack.enter_context(loaded)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    return {f"engine: {mode}": _Engine(engine, mode, experiment.batch) for mode in _ENGINE_MODES[kind]}


def _prompts(workload: Workload, model: Any) -> list[list[int]]:
    """The random prompts of a workload, as token ids of this model."""
    items = workload.requests(int(model.config.get_text_config(decoder=True).vocab_size))
    return [cast(list[int], item.prompt) for item in items]
