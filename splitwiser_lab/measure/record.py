"""Recording every mode on the same work: what `splitwiser-lab record` does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.result import Result
from splitwiser_lab.measure.compare import ModeRuns, compare
from splitwiser_lab.measure.monitor import Monitor
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.measure.recording import Recording
from splitwiser_lab.measure.workload import Workload


def record(
    model: Any,
    workload: Workload,
    modes: Sequence[str] | None = None,
    *,
    repeats: int = 3,
    report: Callable[[str], None] = lambda _: None,
    **load: Any,
) -> list[Recording]:
    """Run `workload` in each of `modes` (None: all that run here), by turns, and record one run of each.

    A monitor watches all the while. Of the interleaved repeats the one of median duration is recorded. Every
    token of every repeat is checked against transformers. Arguments and errors are those of `compare`.
    """
    with Engine.from_pretrained(model, **load) as engine:
        with Monitor(engine.device) as monitor:
            compared = compare(engine, workload, modes, repeats=repeats, overlap=False, report=report)
        origin = provenance(engine.device)
        return [
            Recording.of(
                middle_run(run),
                engine,
                workload,
                tokens_identical=run.tokens_identical,
                tokens_against=compared.reference,
                monitor=monitor,
                origin=origin,
            )
            for run in compared.runs
        ]


def middle_run(run: ModeRuns) -> Result:
    """The result whose duration is the median of all repeats."""
    middle = median_low([result.timeline.duration for result in run.results])
    return next(result for result in run.results if result.timeline.duration == middle)


def file_name(recording: Recording) -> str:
    """A name that tells what is inside, e.g. `smollm2-135m.azure-conv.chunked-chunk_tokens-256.json.gz`."""
    parts = (Path(recording.model).name, str(recording.workload["name"]), recording.label)
    return ".".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts) + ".json.gz"
