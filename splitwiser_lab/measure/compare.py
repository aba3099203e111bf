"""The same work in every mode, warmed up, interleaved, repeated, and every token checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import supported_modes
from splitwiser_lab.engine.result import Result
from splitwiser_lab.errors import ModeError, RequestError
from splitwiser_lab.measure.document import Document
from splitwiser_lab.measure.mode_spec import ModeSpec
from splitwiser_lab.measure.overlap import Overlap, measure_overlap
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.measure.reference import Reference, TokenCheck
from splitwiser_lab.measure.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "splitwiser-lab/comparison/1"
_WARM_UP_REQUESTS = 2
_PERFECT_GAIN = 2.0  # two phases that do not feel each other
_COLUMNS = {  # of the table: heading -> (figure, digits)
    "TTFT p50 ms": ("median_ttft_ms", 0),
    "TPOT p50 ms": ("median_tpot_ms", 1),
    "ITL p50 ms": ("median_itl_ms", 1),
    "ITL p99 ms": ("p99_itl_ms", 0),
    "ITL max ms": ("max_itl_ms", 0),
    "output tok/s": ("output_throughput", 1),
    "overlap gain": ("overlap_gain", 2),
}


@dataclass(frozen=True)
class ModeRuns:
    """All repeats of one mode: results, token checks per repeat and request, and overlap measurements."""

    mode: str
    results: list[Result]
    checks: list[list[TokenCheck]]
    overlaps: list[Overlap] = field(default_factory=list)

    @property
    def tokens_identical(self) -> bool:
        """Every token of every request in every repeat equals the reference's."""
        return all(check.identical for repeat in self.checks for check in repeat)

    @property
    def differences(self) -> list[str]:
        """What differed, request by request, with the logit gap."""
        return [
            f"repeat {r}, request {i}: {check}"
            for r, repeat in enumerate(self.checks)
            for i, check in enumerate(repeat)
            if not check.identical
        ]

    def samples(self) -> dict[str, list[float]]:
        """Each figure with its value in every repeat."""
        repeats: list[dict[str, Any]] = [result.metrics.to_dict() for result in self.results]
        found = {name: [r[name] for r in repeats if r[name] is not None] for name in repeats[0]}
        found["overlap_gain"] = [overlap.gain for overlap in self.overlaps]
        return {name: values for name, values in found.items() if values}

    def figures(self) -> dict[str, Any]:
        """Medians over the repeats under the names of `vllm bench serve`, with minimum and maximum in `spread`."""
        samples = self.samples()
        return {
            "mode": self.mode,
            **{name: median(values) for name, values in samples.items()},
            "overlap_gain": median(samples["overlap_gain"]) if self.overlaps else None,
            "tokens_identical": self.tokens_identical,
            "differences": self.differences,
            "repeats": len(self.results),
            "spread": {name: [min(values), max(values)] for name, values in samples.items()},
        }


@dataclass(frozen=True)
class Comparison(Document):
    """What `compare` found. Print it, or write it with `to_json`."""

    runs: list[ModeRuns]
    model: str
    workload: dict[str, Any]
    origin: dict[str, Any]
    reference: str

    def __getitem__(self, mode: str) -> ModeRuns:
        return next(run for run in self.runs if run.mode == mode)

    @property
    def tokens_identical(self) -> bool:
        """No mode wrote a token that the reference did not."""
        return all(run.tokens_identical for run in self.runs)

    @property
    def disturbed(self) -> str:
        """Which overlap gains are more than two phases can have that share a machine, and why; empty where none is."""
        gains = {run.mode: run.samples().get("overlap_gain", []) for run in self.runs}
        beyond = [mode for mode, values in gains.items() if values and median(values) > _PERFECT_GAIN]
        if not beyond:
            return ""
        return (
            f"the overlap gain of {' and '.join(beyond)} is above {_PERFECT_GAIN:g}, what two phases have that do not "
            "feel each other: other programs probably kept this machine busy while the phases ran alone. Measure again "
            "when it is quiet."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, ready for JSON."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "reference": self.reference,
            "workload": self.workload,
            "tokens_identical": self.tokens_identical,
            "runs": [run.figures() for run in self.runs],
            **self.origin,
        }

    def rows(self) -> list[dict[str, Any]]:
        """The table: one row per mode, medians with the range over the repeats in brackets."""
        rows = []
        for run in self.runs:
            samples = run.samples()
            row: dict[str, Any] = {"mode": run.mode}
            for heading, (figure, digits) in _COLUMNS.items():
                row[heading] = with_range(samples.get(figure, []), digits)
            row["completed"] = f"{run.results[-1].metrics.completed}/{len(run.results[-1].requests)}"
            row["tokens"] = "identical" if run.tokens_identical else f"{len(run.differences)} differ"
            rows.append(row)
        return rows

    def table(self) -> Table:
        """The rows as a table for a terminal or a notebook."""
        from rich.table import Table

        table = Table(title=f"{self.model}: {self.workload['name']}, {self.workload['requests']} requests")
        rows = self.rows()
        for heading in rows[0]:
            table.add_column(heading, justify="left" if heading in ("mode", "tokens") else "right")
        for row in rows:
            table.add_row(*(str(cell).replace(" (", "\n(") for cell in row.values()))
        count = len(self.runs[0].results)
        table.caption = f"median of {count} interleaved repeats (lowest–highest); tokens against {self.reference}"
        if self.disturbed:
            table.caption += f"\n{self.disturbed}"
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def with_range(values: Sequence[float], digits: int) -> str:
    """`12.3 (11.9–13.0)`: the median, and in brackets the lowest and the highest."""
    if not values:
        return "n/a"
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} ({low}–{high})" if len(values) > 1 else middle


def compare(
    model: Any = "smollm2-135m",
    workload: Workload | None = None,
    modes: Sequence[str] | None = None,
    *,
    repeats: int = 3,
    overlap: bool = True,
    reference: Any = None,
    report: Callable[[str], None] = lambda _: None,
    **load: Any,
) -> Comparison:
    """Run `workload` in each of `modes` (None: all that run here) and compare times and tokens.

    A mode may carry options: `"chunked:chunk_tokens=256"`.
    `model` is an Engine, or whatever `Engine.from_pretrained` takes (`load` goes there too). Each round
    runs every mode once, after a warm-up of each. The reference is transformers' `generate` on the same
    weights (`reference`: a model to use for it). `report` is told what happens next. Raises ModeError
    for a mode that cannot run here, before anything else is done.
    """
    if workload is None:
        workload = Workload.closed(8, prompt_tokens=64, output_tokens=16)
    own = not isinstance(model, Engine)
    if repeats < 1:
        raise RequestError(f"repeats={repeats}: measure at least once, better three times.")
    engine: Engine = Engine.from_pretrained(model, **load) if own else model
    try:
        available = [mode.mode for mode in supported_modes(engine.device) if mode.available]
        chosen = list(modes) if modes is not None else available
        if not chosen:
            raise ModeError(f"no modes to compare: name some of {', '.join(available)}.")
        specs = {mode: ModeSpec.parse(mode) for mode in chosen}
        for spec in specs.values():
            spec.check(engine.device)
        before = engine.mode
        report("asking transformers for the reference's tokens")
        judge = Reference(reference or (engine.model.reference() if not own or isinstance(model, str) else model))
        expected = _expected(engine, workload, judge)
        runs = {mode: ModeRuns(mode, [], []) for mode in chosen}
        for mode in chosen:
            report(f"warming up {mode}")
            specs[mode].set(engine)
            engine.serve(workload.head(_WARM_UP_REQUESTS))
        for number in range(repeats):
            for mode in chosen:
                report(f"round {number + 1} of {repeats}: {mode}")
                specs[mode].set(engine)
                result = engine.serve(workload)
                runs[mode].results.append(result)
                checks = [judge.check(r.prompt, r.output, e) for r, e in zip(result.requests, expected, strict=True)]
                runs[mode].checks.append(checks)
        if overlap:
            for mode, overlaps in measure_overlap(engine, chosen, repeats=repeats, report=report).items():
                runs[mode].overlaps.extend(overlaps)
        engine.set_mode(before)
        name = f"transformers {engine.model.name}, {str(engine.dtype).removeprefix('torch.')}"
        return Comparison(list(runs.values()), engine.model.name, workload.describe(), provenance(engine.device), name)
    finally:
        if own:
            engine.close()


def _expected(engine: Engine, workload: Workload, judge: Reference) -> list[list[int]]:
    """The reference's tokens for each request of the workload; none for one that will be refused."""
    expected = []
    for item in workload.requests(vocab_size=engine.config.vocab_size, max_tokens=engine.longest_request):
        prompt = engine.tokenize(item.prompt) if isinstance(item.prompt, str) else item.prompt
        fits = 0 < len(prompt) <= engine.longest_request - item.max_new_tokens
        expected.append(judge.tokens(prompt, item.max_new_tokens, item.ignore_eos) if fits else [])
    return expected
