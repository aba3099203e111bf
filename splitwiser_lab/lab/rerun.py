"""The paper's figures beside those of this project: every recorded reproduction, laid next to what was reported.

A recording that does not exist is named as such; nothing is left out silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitwiser_lab.errors import RecordingError
from splitwiser_lab.measure import shipped
from splitwiser_lab.measure.mode_spec import ModeSpec
from splitwiser_lab.pipelines.document import Reproduction
from splitwiser_lab.pipelines.reported import CLAIMS, Claim
from splitwiser_lab.pipelines.rows import BASE, Row, Work
from splitwiser_lab.pipelines.winners import best_row

MISSING = "not recorded yet"
COMMANDS = """\
splitwiser-lab reproduce --pipeline hf --scale small --json reproduce-hf.json
splitwiser-lab reproduce --pipeline vllm --scale small --json reproduce-vllm.json
splitwiser-lab reproduce --pipeline hf --scale paper --start-together --no-mps --json part-1.json
splitwiser-lab reproduce --pipeline hf --scale paper --start-together --mps --json part-2.json
splitwiser-lab reproduce --join part-1.json --join part-2.json --json reproduce-hf.json
splitwiser-lab reproduce --pipeline vllm --scale paper --start-together --no-mps --rate 70% --json part-1.json
splitwiser-lab reproduce --pipeline vllm --scale paper --start-together --mps --rate RATE_OF_PART_1 --json part-2.json
splitwiser-lab reproduce --join part-1.json --join part-2.json --json reproduce-vllm.json
splitwiser-lab reproduce --pipeline vllm --scale paper --mps --rate 70% \\
    --eager --max-batch 8 --json reproduce-vllm-8.json
# and the same with --model llama-3.2-1b-shape"""
_PLACES = {"CPU": "recordings/cpu", "H200": "recordings/h200"}
_PAPERS = (BASE, "replicas", "split")  # modes of the paper's pipelines
_LATENCIES = {"TTFT p50": "median_ttft_ms", "TTFT p99": "p99_ttft_ms", "ITL p99": "p99_itl_ms"}
_PIPELINES = {"hf": "Hugging Face", "vllm": "vLLM"}


@dataclass(frozen=True)
class Recorded:
    """A reproduction that was recorded, and what to call it; `document` is None where there is none yet."""

    label: str
    place: str
    pipeline: str
    document: Reproduction | None = None

    def __str__(self) -> str:
        """Where, when and by which command it was measured, and what is missing from it."""
        if self.document is None:
            return f"{self.label}: {MISSING}"
        origin, work = self.document.origin, self.document.work
        machine = f"{origin['hardware']['device_name']}, {origin['hardware']['cores']} CPU cores"
        when = f"{origin['time_utc'][:10]}, commit {origin['commit']}"
        lines = (f"{self.label}: {work}", f"on {machine}; {when}", origin["command"], *self.document.missing())
        return "\n  ".join(lines)


def recorded_reproductions() -> list[Recorded]:
    """All `reproduce-*.json` that come with the package, and a place for each pipeline that has none on a machine.

    Raises RecordingError for a file that is damaged.
    """
    found = []
    for place, folder in _PLACES.items():
        where = shipped.find(folder)
        documents = [Reproduction.load(path) for path in sorted(where.glob("reproduce-*.json"))] if where else []
        for pipeline, name in _PIPELINES.items():
            own = [document for document in documents if document.pipeline == pipeline]
            label = f"{place}, {name}"
            made = [
                Recorded(label + which, place, pipeline, document)
                for which, document in zip(_apart([document.work for document in own]), own, strict=True)
            ]
            found += made or [Recorded(label, place, pipeline)]
    return found


def _apart(works: list[Work]) -> list[str]:
    """What tells each of several works from the others; nothing for a single one."""
    words = [(w.model, w.regime or "default", f"{w.input_tokens} tokens in") for w in works]
    differing = [place for place, told in enumerate(zip(*words, strict=True)) if len(set(told)) > 1]
    return ["".join(f", {told[place]}" for place in differing) for told in words]


def hardware_shared(shape: str = "llama-3.2-1b-shape") -> tuple[str, dict[str, float]]:
    """What was recorded of this package's engine on a GPU: the load and the machine, and the overlap gain of each mode.

    Each phase is a CUDA graph there, so that no host gap is left to fill: what is gained is hardware used by both
    phases at once. What was withdrawn since is left out, and said. Raises RecordingError when the recording is missing.
    """
    path = shipped.find("recordings/h200/bench_gpu.json")
    if path is None:
        raise RecordingError("recordings/h200/bench_gpu.json is missing: use a whole checkout, or install again.")
    raw = json.loads(path.read_text(encoding="utf-8"))
    rows = raw["sections"]["overlap"][shape]["rows"]
    load = rows[0]["load"]
    told = f"{shape}, {load}, on {raw['hardware']['device_name']} ({raw['time_utc'][:10]}, commit {raw['commit']})"
    without = _withdrawn(path)
    told += "".join(f"; without {mode}: {why}" for mode, why in without.items())
    named = [(ModeSpec.parse(row["mode"]), row["gain"]["median"]) for row in rows if row["load"] == load]
    return told, {spec.label: value for spec, value in named if spec.mode not in without}


def _withdrawn(recording: Path) -> dict[str, str]:
    """Modes of a recording that were found wrong after it was made, and why. The recording itself is never edited."""
    told = recording.with_name("withdrawn.json")
    found = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
    return dict(found.get(recording.name, {}))


def gain(document: Reproduction, row: Row, figure: str = "output_throughput") -> float | None:
    """A row's figure as a multiple of `sequential` at the same output length; None where either was not measured."""
    if figure == "output_throughput":
        return row.figure("over_sequential")
    base = document.row(BASE, row.output, row.rate)
    ours, theirs = row.figure(figure), base.figure(figure) if base else None
    return ours / theirs if ours and theirs else None


def beside_reported(found: list[Recorded]) -> list[dict[str, str]]:
    """The one table: each reported figure, with what is unknown and its source, and below it what was measured here.

    Recordings of the other pipeline are left out where a figure is about one of them.
    """
    rows = []
    for claim in CLAIMS:
        told = {"reported": f"{claim.said} (a gain of {claim.gain:.2f})", "for": claim.setup}
        rows.append({**told, "recorded": "", "measured here": "", "not told": claim.unknown, "source": claim.source})
        rows += [
            {
                **{"reported": "", "for": "", "recorded": recorded.label, "measured here": _cell(claim, recorded)},
                **{"not told": "", "source": ""},
            }
            for recorded in found
            if claim.pipeline in ("", recorded.pipeline)
        ]
    return rows


def throughputs(document: Reproduction, output: int) -> dict[str, float]:
    """Output tok/s of every way to do the work, all requests at once, at one output length: for bars."""
    rates = ((row.name, row.figure("output_throughput")) for row in _at_once(document) if row.output == output)
    return {name: rate for name, rate in rates if rate is not None}


def gains(document: Reproduction, output: int) -> dict[str, float]:
    """Multiples of `sequential` of every way to do the work, all requests at once, at one output length: for bars."""
    rates = ((row.name, gain(document, row)) for row in _at_once(document) if row.output == output)
    return {name: rate for name, rate in rates if rate is not None}


def best(document: Reproduction, *modes: str) -> tuple[Row, float] | None:
    """The row of these modes with the largest gain, all requests at once, and the gain; None without any."""
    rows = (row for row in _at_once(document) if row.mode in modes)
    made = [(row, value) for row in rows if (value := gain(document, row)) is not None]
    return max(made, key=lambda pair: pair[1]) if made else None


def _at_once(document: Reproduction) -> Iterator[Row]:
    """The rows that throughput can be read from: where requests come one by one, they set the pace."""
    return (row for row in document.rows if row.rate is None)


def one_by_one(found: list[Recorded]) -> list[dict[str, str]]:
    """For a table: where requests came one by one, who was best at which latency, and how much against `sequential`."""
    rows = []
    for recorded in found:
        document = recorded.document
        loads = dict.fromkeys((row.output, row.rate) for row in document.rows if row.rate) if document else {}
        for output, rate in loads:
            assert document is not None
            those = [row for row in document.rows if (row.output, row.rate) == (output, rate) and row.mode in _PAPERS]
            told = {"recorded": recorded.label, "arrivals/s": f"{rate:.3g}", "new tokens": str(output)}
            rows.append(told)
            if all(row.mode == BASE for row in those):
                told["TTFT p50"] = "replicas and split were not measured so"
                continue
            for heading, figure in _LATENCIES.items():
                made = best_row(those, figure)
                told[heading] = f"{made[0].name} ({_ms(made[0].figure(figure))}, {made[1]:.2f} ×)" if made else "n/a"
    return rows or [{"recorded": "requests one by one (`--rate`)", "arrivals/s": MISSING}]


def _ms(value: float | None) -> str:
    assert value is not None
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _cell(claim: Claim, recorded: Recorded) -> str:
    document = recorded.document
    if document is None:
        return MISSING
    if claim.processes is None:
        found = best(document, *claim.modes)
        return f"best: {_told(claim, document, *found)}" if found else "no such row"
    told = [_told(claim, document, row, value) for row, value in _meant(claim, document)]
    return "; ".join(told) or f"not run with {claim.processes} processes"


def _meant(claim: Claim, document: Reproduction) -> Iterator[tuple[Row, float]]:
    for row in _at_once(document):
        value = gain(document, row, claim.figure)
        if row.mode in claim.modes and row.processes == claim.processes and value is not None:
            yield row, value


def _told(claim: Claim, document: Reproduction, row: Row, value: float) -> str:
    """`replicas × 2: 1.82, more`, with the output length where there are several."""
    several = len({each.output for each in document.rows}) > 1
    length = f", {row.output} new tokens" if several else ""
    word = "a loss" if value < 1 else "less" if value < claim.gain else "as much or more"
    return f"{row.name}{length}: {value:.2f}, {word}"


def summary(found: list[Recorded]) -> list[dict[str, Any]]:
    """For each recording: the best of the paper's placements, and this package's engine on the same work."""
    rows: list[dict[str, Any]] = []
    for recorded in found:
        document = recorded.document
        if document is None:
            rows.append({"recorded": recorded.label, "best of the paper's": MISSING})
            continue
        told: dict[str, Any] = {"recorded": recorded.label}
        for heading, modes in (
            ("best of the paper's", ("replicas", "split")),
            ("split", ("split",)),
            ("this package's engine", ("engine",)),
        ):
            row = best(document, *modes)
            told[heading] = f"{row[1]:.2f} × ({row[0].name}, {row[0].output} new tokens)" if row else "n/a"
        rows.append(told)
    return rows
