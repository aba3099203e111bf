"""The bench: our phases beside those of others, our overheads, the overlap gain. Ratios within one run.

Every figure is the median of interleaved repeats with its lowest and highest value; absolute times mean
little between machines, so what counts is the ratio to a peer that ran a moment before on the same one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, get_args

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import supported_modes
from splitwiser_lab.measure.breakdown import Breakdown, Load, break_down, table_of
from splitwiser_lab.measure.compare import Comparison, compare, with_range
from splitwiser_lab.measure.document import Document
from splitwiser_lab.measure.overlap import measure_limit, measure_overlap
from splitwiser_lab.measure.peers import Peer, find_peers
from splitwiser_lab.measure.profile import profile_phases
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.timeline import Phase

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "splitwiser-lab/bench/1"
_DECODE = Load("decode, batch 8, context 128", prompts=8, length=128, new_tokens=65)
_PAUSE_SECONDS = 0.5  # for the threads of the peer before to fall asleep: some spin a while after their work
_PREDICTED = ((64, 512), (1, 8))  # prompt lengths, batch sizes
_PREFILL = Load("prefill, 512 tokens", prompts=1, length=512, new_tokens=1)


@dataclass(frozen=True)
class Figure:
    """One figure: samples of ours, samples of each peer taken by turns with ours, and what to reach."""

    name: str
    unit: str
    ours: list[float]
    peers: dict[str, list[float]] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def ratios(self, peer: str) -> list[float]:
        """Ours over the peer's, repeat by repeat."""
        return [a / b for a, b in zip(self.ours, self.peers[peer], strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Samples, medians and ratios, ready for JSON."""
        return {
            "figure": self.name,
            "unit": self.unit,
            "median": median(self.ours),
            "samples": self.ours,
            "targets": self.targets,
            "note": self.note,
            "peers": {
                peer: {"median": median(samples), "samples": samples, "ratio": median(self.ratios(peer))}
                for peer, samples in self.peers.items()
            },
        }


@dataclass(frozen=True)
class Bench(Document):
    """All figures, the comparison of the modes, and who was missing."""

    figures: list[Figure]
    comparison: Comparison
    missing: dict[str, str]
    tokens: dict[str, str]
    settings: dict[str, str]  # how each peer runs
    breakdowns: list[Breakdown]
    origin: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, ready for JSON; `runs` are the modes, as in a comparison."""
        return {
            **self.comparison.to_dict(),
            "schema": SCHEMA,
            "figures": [figure.to_dict() for figure in self.figures],
            "missing": self.missing,
            "peer_tokens": self.tokens,
            "peer_settings": self.settings,
            "breakdowns": [breakdown.to_dict() for breakdown in self.breakdowns],
            **self.origin,
        }

    def breakdown_table(self) -> Table:
        """Where the time of each phase goes, ours beside the peers'."""
        return table_of(self.breakdowns)

    def table(self) -> Table:
        """One row per figure and peer."""
        from rich.table import Table

        table = Table(title="splitwiser-lab bench", caption="median of interleaved repeats (lowest–highest)")
        for heading in ("figure", "ours", "beside", "theirs", "ours / theirs", "to reach"):
            table.add_column(heading, justify="left" if heading in ("figure", "beside") else "right")
        for figure in self.figures:
            ours = f"{with_range(figure.ours, 2 if median(figure.ours) < 10 else 0)} {figure.unit}"
            reach = figure.targets.get("", None)
            if not figure.peers:
                table.add_row(figure.name, ours, "", "", "", "" if reach is None else _limit(reach, figure.unit))
            for number, (peer, samples) in enumerate(figure.peers.items()):
                target = figure.targets.get(peer.split(" 0.")[0])
                table.add_row(
                    figure.name if number == 0 else "",
                    ours if number == 0 else "",
                    peer,
                    with_range(samples, 0),
                    with_range(figure.ratios(peer), 2),
                    "" if target is None else f"≥ {target}",
                )
        for peer, why in self.missing.items():
            table.add_row(f"{peer} is missing", "", why, "", "", "")
        return table


def _limit(value: float, unit: str) -> str:
    return f"≤ {value} {unit}" if unit in ("ms", "s", "%") else f"≥ {value}"


def bench(
    model: str = "smollm2-135m",
    *,
    repeats: int = 5,
    vllm_python: str | None = None,
    report: Callable[[str], None] = lambda _: None,
    **load: Any,
) -> Bench:
    """Measure all figures here; a quarter of an hour on two cores with vLLM. Let nothing else run meanwhile."""
    with Engine.from_pretrained(model, **load) as engine:
        reference = engine.model.reference()
        peers, missing = find_peers(engine, reference, vllm_python)
        try:
            report(f"peers: {', '.join(peer.name for peer in peers)}")
            settings = {peer.name: peer.settings for peer in peers}
            decode, agree = _rates(peers, _DECODE, repeats, report, engine)
            prefill, _ = _rates(peers, _PREFILL, repeats, report, engine)
            loads = (_PREFILL, _DECODE) if engine.device == "cpu" else ()  # on a GPU an operator only starts a kernel
            size = engine.config.vocab_size
            parts = [part for load in loads for part in break_down(peers, load, size, min(repeats, 3), report)]
        finally:
            for peer in peers:
                peer.close()
        wanted = {"HF generate": 1.3, "vLLM": 1.0}
        figures = [
            _figure(_DECODE.name, decode, wanted),
            _figure(_PREFILL.name, prefill, {"HF generate": 1.0, "vLLM": 1.0}),
        ]
        modes = [mode.mode for mode in supported_modes(engine.device) if mode.available]
        overlaps = measure_overlap(engine, modes, repeats=repeats, report=report)
        if "processes" in modes:
            gains = [overlap.gain for overlap in overlaps["processes"]]
            figures.append(Figure("overlap gain, processes: 512 with 1@512", "×", gains, targets={"": 1.3}))
            report("the most that this gain could be")
            limits = measure_limit(engine, "processes", repeats=repeats)
            figures.append(Figure("its limit: each phase alone on its share of the cores", "×", limits))
        for mode in ("sequential", "processes"):
            if mode in modes:
                report(f"overhead per step, {mode}")
                figures.append(_overhead(engine, mode, repeats))
        report("predicted beside measured phases")
        figures += _predictions(engine, repeats)
        figures.append(Figure("import splitwiser_lab", "s", _import_seconds(), targets={"": 0.5}))
        workload = Workload.poisson(2.0, requests=12, prompt_tokens=192, output_tokens=32)
        rounds = min(repeats, 3)
        comparison = compare(engine, workload, repeats=rounds, overlap=False, reference=reference, report=report)
        for run in comparison.runs:
            run.overlaps.extend(overlaps[run.mode])
        return Bench(figures, comparison, missing, agree, settings, parts, provenance(engine.device))


def _rates(
    peers: Sequence[Peer], load: Load, repeats: int, report: Callable[[str], None], engine: Engine
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Tokens per second of each peer, by turns, and whether their tokens equal ours.

    Decode is the time to `new_tokens` less the time to the first token, measured apart; prefill is the latter.
    """
    prompts = load.draw(engine.config.vocab_size)
    found: dict[str, list[float]] = {peer.name: [] for peer in peers}
    written: dict[str, list[list[int]]] = {}
    for number in range(repeats + 1):  # round 0 warms up
        for peer in peers:
            report(f"{load.length}→{load.new_tokens} round {number} of {repeats}: {peer.name}")
            time.sleep(_PAUSE_SECONDS)
            first, tokens = peer.run(prompts, 1)
            seconds, done = first, load.prompts * load.length
            if load.new_tokens > 1:
                whole, tokens = peer.run(prompts, load.new_tokens)
                seconds, done = whole - first, load.prompts * load.steps
            written[peer.name] = tokens
            if number:
                found[peer.name].append(done / seconds)
    ours = written[peers[0].name]
    return found, {
        name: f"{sum(map(list.__eq__, tokens, ours))} of {len(ours)} identical" for name, tokens in written.items()
    }


def _figure(name: str, rates: dict[str, list[float]], targets: dict[str, float]) -> Figure:
    ours, *others = rates
    return Figure(name, "tok/s", rates[ours], {peer: rates[peer] for peer in others}, targets)


def _overhead(engine: Engine, mode: str, repeats: int) -> Figure:
    """What a decode step costs beyond its batch on the lane: from one start to the next, less the span."""
    engine.set_mode(mode)
    prompts = [[10 + number] * 64 for number in range(8)]
    samples = []
    for number in range(repeats + 1):
        result = engine.generate(prompts, 24, ignore_eos=True)
        steps = [span for span in result.timeline.spans if span.phase == "decode" and span.sequences == len(prompts)]
        gaps = [(later.start - earlier.start - earlier.seconds) * 1e3 for earlier, later in pairwise(steps)]
        if number:
            samples.append(median(gaps))
    limit = 1.0 if mode == "sequential" else 2.0
    return Figure(f"overhead per decode step, {mode}", "ms", samples, targets={"": limit})


def _predictions(engine: Engine, repeats: int) -> list[Figure]:
    """How far the predicted times of each phase lie from the measured ones: one sample per shape."""
    found = profile_phases(engine, *_PREDICTED, repeats=repeats)
    figures = []
    for phase in get_args(Phase):
        timings = found.of(phase)
        errors = [100 * abs(timing.error) for timing in timings]
        note = ", ".join(f"{t.batch} × {t.tokens}: {100 * t.error:+.0f} %" for t in timings)
        figures.append(Figure(f"predicted {phase} times, off by", "%", errors, targets={"": 25}, note=note))
    return figures


def _import_seconds(times: int = 5) -> list[float]:
    """Seconds that `import splitwiser_lab` takes in a fresh interpreter."""
    code = "import time; t = time.perf_counter(); import splitwiser_lab; print(time.perf_counter() - t)"
    return [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(times)
    ]
