"""Several ways to do the same work, by turns: what every reproduction does, whichever pipeline it is of.

Beside a pipeline run transformers' own `generate`, whose tokens are the reference, and this package's engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.errors import HardwareError
from splitwiser_lab.measure.peers import GeneratePeer
from splitwiser_lab.measure.reference import Reference, TokenCheck
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.arrivals import Rate, arriving
from splitwiser_lab.pipelines.rows import BASE, Row

_ENGINE_MODES = {"cpu": ("sequential", "processes"), "cuda": ("sequential", "streams")}


class Runner(Protocol):
    """A way to do the work: figures and tokens of one round."""

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]: ...


@runtime_checkable
class Launched(Protocol):
    """A way to do the work that has processes of its own."""

    def launch(self, workload: Workload) -> None:
        """Start them for work like this, unless they run, without waiting for them."""
        ...


class Placed(Protocol):
    """What a row says of a placement, whose name is its text."""

    @property
    def mode(self) -> str:
        """The pipeline's mode."""
        ...

    @property
    def processes(self) -> int:
        """How many share the device."""
        ...

    @property
    def mps(self) -> bool:
        """Whether they are clients of an MPS daemon."""
        ...


class Plan(Protocol):
    """An experiment: the work, and the placements that do it."""

    @property
    def placements(self) -> Sequence[Placed]:
        """The ways of the pipeline."""
        ...

    def workload(self, output: int) -> Workload:
        """The requests, with `output` new tokens each."""
        ...

    def warm_up(self, output: int, processes: int) -> Workload:
        """A few of them, enough for so many processes."""
        ...


@dataclass(frozen=True)
class Turns:
    """Lets all runners do the same work by turns. What has no room goes to `skipped`; where that is None, it raises.

    With `rates`, the same requests also come one by one, at each of them, to all but `generate`. With
    `start_together`, all processes start side by side, which is faster; what each start took, and what memory is
    whose, is not told then, and memory that none has taken yet is offered to all: let them be few enough.
    """

    runners: dict[str, Runner]
    experiment: Plan
    judge: Reference
    skipped: dict[str, str] | None
    report: Callable[[str], None]
    rates: Sequence[Rate] = ()
    start_together: bool = False

    def rows(self, output: int, repeats: int) -> list[Row]:
        """One row for each runner and way of arriving, with `output` new tokens a request."""
        work = self.experiment.workload(output)
        prompts = prompts_of(work, self.judge.model)
        self.report(f"{output} new tokens: asking transformers for the reference's tokens")
        _, expected = self.runners["generate"](work)

        theirs = [self.judge.continuation(*pair) for pair in zip(prompts, expected, strict=True)]

        @cache  # many ways and rounds write the same tokens
        def check(number: int, ours: tuple[int, ...]) -> TokenCheck:
            return theirs[number].check(ours)

        if self.start_together:
            self._launch(work)
        names = [name for name in self.runners if self._warm_up(name, output)]
        rows = self._rounds(work, names, output, None, repeats, check)
        served = next(row for row in rows if row.name == BASE).figure("request_throughput") or 0.0
        later = [name for name in names if name != "generate"]  # it takes batches, which have to be there
        for rate in (wanted.requests_per_s(served) for wanted in self.rates):
            rows += self._rounds(arriving(work, rate), later, output, rate, repeats, check)
        return rows

    def _rounds(
        self,
        work: Workload,
        names: Sequence[str],
        output: int,
        rate: float | None,
        repeats: int,
        check: Callable[[int, tuple[int, ...]], TokenCheck],
    ) -> list[Row]:
        rows = {name: self._row(name, output, rate) for name in names}
        when = "" if rate is None else f", {rate:.3g} requests/s"
        for number in range(repeats):
            for name, row in rows.items():
                self.report(f"{output} new tokens{when}: round {number + 1} of {repeats}, {name}")
                figures, tokens = self.runners[name](work)
                row.add(figures)
                row.judge(map(check, range(len(work)), map(tuple, tokens)))
            base = rows[BASE].samples["output_throughput"][-1]
            for row in rows.values():
                row.add({"over_sequential": row.samples["output_throughput"][-1] / base})
        return list(rows.values())

    def _launch(self, work: Workload) -> None:
        for name, runner in self.runners.items():
            if isinstance(runner, Launched):
                self.report(f"starting {name}")
                with suppress(HardwareError):  # the warm-up comes to it again, and knows what to do
                    runner.launch(work)

    def _placement(self, name: str) -> Placed | None:
        return next((placement for placement in self.experiment.placements if str(placement) == name), None)

    def _row(self, name: str, output: int, rate: float | None) -> Row:
        placement = self._placement(name)
        if placement is None:
            return Row(name, output, name.partition(":")[0], rate=rate)
        return Row(name, output, placement.mode, placement.processes, placement.mps, rate)

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


class GenerateRunner:
    """transformers' `generate` in this process, batch by batch."""

    def __init__(self, model: Any, batch: int) -> None:
        self._peer, self._model, self._batch = GeneratePeer(model), model, batch

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        prompts, new_tokens = prompts_of(workload, self._model), workload.arrivals[0].max_new_tokens
        seconds, tokens = 0.0, []
        for start in range(0, len(prompts), self._batch):
            taken, new = self._peer.run(prompts[start : start + self._batch], new_tokens)
            seconds += taken
            tokens += new
        return {"duration": seconds, "output_throughput": sum(map(len, tokens)) / seconds}, tokens


class EngineRunner:
    """This package's engine in one mode."""

    def __init__(self, engine: Engine, mode: str, batch: int) -> None:
        self._engine, self._mode, self._batch = engine, mode, batch

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        self._engine.set_mode(self._mode, max_batch=self._batch)
        result = self._engine.serve(workload)
        return result.metrics.to_dict(), result.tokens


def engine_runners(
    stack: ExitStack, model: str, device: str, dtype: str, batch: int, longest: int
) -> dict[str, Runner]:
    """This package's engine in one process and in two phases side by side, `batch` requests of up to `longest` tokens.

    It lives until the stack ends. Raises ModelError for a model that it does not run.
    """
    room = 2 * batch * (longest + 64)
    engine = stack.enter_context(Engine.from_pretrained(model, device=device, dtype=dtype, kv_tokens=room))
    kind = "cuda" if device.startswith("cuda") else "cpu"
    return {f"engine: {mode}": EngineRunner(engine, mode, batch) for mode in _ENGINE_MODES[kind]}


def prompts_of(workload: Workload, model: Any) -> list[list[int]]:
    """The random prompts of a workload, as token ids of this model."""
    items = workload.requests(int(model.config.get_text_config(decoder=True).vocab_size))
    return [cast(list[int], item.prompt) for item in items]
