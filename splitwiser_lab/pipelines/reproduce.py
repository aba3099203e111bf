"""The paper's Hugging Face experiment, run again: every placement on the same work, interleaved, tokens checked.

Beside the pipeline run transformers' own `generate`, in this process, and this package's engine with the
same limit of requests at once. Each keeps its processes between the rounds, so a round measures no start.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, cast

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.errors import HardwareError, ModeError, ModelError, RequestError
from splitwiser_lab.measure.compare import with_range
from splitwiser_lab.measure.document import Document
from splitwiser_lab.measure.peers import GeneratePeer
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.measure.reference import Reference, TokenCheck
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.experiment import Experiment
from splitwiser_lab.pipelines.huggingface import HuggingFacePipeline
from splitwiser_lab.pipelines.placement import Placement
from splitwiser_lab.pipelines.result import PipelineResult

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "splitwiser-lab/reproduction/1"
BASE = "sequential"
_ENGINE_MODES = {"cpu": ("sequential", "processes"), "cuda": ("sequential", "streams")}
_COLUMNS = {  # of the table: heading -> (figure, digits)
    "output tok/s": ("output_throughput", 1),
    "× sequential": ("over_sequential", 2),
    "steady tok/s": ("steady_output_throughput", 1),
    "TTFT p50 ms": ("median_ttft_ms", 0),
    "ITL p50 ms": ("median_itl_ms", 1),
    "hand-off ms": ("hand_off_write_ms", 1),
    "overlap s": ("overlap_seconds", 2),
    "start s": ("spawn_s", 1),
}


@dataclass
class Row:
    """One way to do the work: its figures in every round, and what its tokens were."""

    name: str
    output: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    checks: list[TokenCheck] = field(default_factory=list)

    @property
    def tokens_identical(self) -> bool:
        """Every token of every request in every round is that of `generate`."""
        return all(check.identical for check in self.checks)

    def add(self, figures: dict[str, Any]) -> None:
        """Take the figures of one round, leaving out what was not measured."""
        for name, value in figures.items():
            if value is not None:
                self.samples.setdefault(name, []).append(float(value))

    def to_dict(self) -> dict[str, Any]:
        """Medians over the rounds, with minimum and maximum in `spread`."""
        return {
            "name": self.name,
            "output_tokens": self.output,
            **{name: median(values) for name, values in self.samples.items()},
            "tokens_identical": self.tokens_identical,
            "differences": [str(check) for check in self.checks if not check.identical],
            "repeats": len(self.samples["output_throughput"]),
            "spread": {name: [min(values), max(values)] for name, values in self.samples.items()},
        }


@dataclass(frozen=True)
class Reproduction(Document):
    """What `reproduce` found. Print its `table`, or write it with `to_json`."""

    experiment: Experiment
    rows: list[Row]
    skipped: dict[str, str]
    random_weights: bool
    dtype: str
    origin: dict[str, Any]

    @property
    def unexplained(self) -> list[str]:
        """Rows with a token that differs from that of `generate` where precision does not explain it."""
        return [row.name for row in self.rows if not all(check.explained for check in row.checks)]

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, ready for JSON."""
        e = self.experiment
        return {
            "schema": SCHEMA,
            "pipeline": "hf",
            "model": e.model,
            "random_weights": self.random_weights,
            "dtype": self.dtype,
            "batch": e.batch,
            "input_tokens": e.input,
            "requests": e.requests,
            "seed": e.seed,
            "rows": [row.to_dict() for row in self.rows],
            "skipped": self.skipped,
            **self.origin,
        }

    def table(self) -> Table:
        """One row per way to do the work, medians with the range over the rounds in brackets."""
        from rich.table import Table

        e = self.experiment
        weights = "random weights of its shape" if self.random_weights else "real weights"
        title = f"{e.model} ({weights}, {self.dtype}): {e.requests} requests of {e.input} tokens, batches of {e.batch}"
        table = Table(title=title)
        for heading in ("out", "", *_COLUMNS, "tokens"):
            table.add_column(heading, justify="left" if heading in ("", "tokens") else "right")
        for row in self.rows:
            cells = [with_range(row.samples.get(name, []), digits) for name, digits in _COLUMNS.values()]
            count = sum(not check.identical for check in row.checks)
            tokens = "identical" if not count else f"{count} differ"
            table.add_row(str(row.output), row.name, *(cell.replace(" (", "\n(") for cell in cells), tokens)
        repeats = len(self.rows[0].samples["output_throughput"])
        table.caption = (
            f"median of {repeats} interleaved rounds (lowest–highest); starts are outside the timer, hand-offs inside; "
            "tokens against transformers' generate on the same batches"
        )
        return table


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
    report: Callable[[str], None] = lambda _: None,
) -> Reproduction:
    """Run `experiment`: each output length, each placement, `repeats` times by turns after a warm-up of each.

    With `skip`, placements that cannot run here are left out, with the reason; else they raise ModeError.
    `engine`: also run this package's engine. `report` is told what happens next.
    """
    if repeats < 1:
        raise RequestError(f"repeats={repeats}: measure at least once, better three times.")
    with ExitStack() as stack:
        report(f"loading {experiment.model}")
        first = stack.enter_context(HuggingFacePipeline.from_pretrained(experiment.model, device, experiment.dtype))
        judge = Reference(first.model())
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
        rows = [row for output in experiment.outputs for row in turns.rows(output, repeats)]
        return Reproduction(experiment, rows, skipped, first.random_weights, dtype, provenance(first.device))


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
        rows = {name: Row(name, output) for name in self.runners if self._warm_up(name, output)}
        for number in range(repeats):
            for name, row in rows.items():
                self.report(f"{output} new tokens: round {number + 1} of {repeats}, {name}")
                figures, tokens = self.runners[name](work)
                row.add(figures)
                row.checks += map(self.judge.check, prompts, tokens, expected)
            base = rows[BASE].samples["output_throughput"][-1]
            for row in rows.values():
                row.add({"over_sequential": row.samples["output_throughput"][-1] / base})
        return list(rows.values())

    def _warm_up(self, name: str, output: int) -> bool:
        """Start and run it once. False when there is no room for it."""
        if name == "generate":
            return True  # the reference's tokens came from it
        self.report(f"{output} new tokens: starting and warming up {name}")
        try:
            self.runners[name](self.experiment.warm_up(output))
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
        self._spawn_s = 0.0  # of the last start, which was in a warm-up

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        result: PipelineResult = self._pipeline.run(workload, self._batch)
        self._spawn_s = max(result.spawn_s, default=self._spawn_s)
        return {**result.figures(), "spawn_s": self._spawn_s}, result.tokens


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
