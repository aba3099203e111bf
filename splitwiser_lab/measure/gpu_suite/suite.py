"""Runs the sections in a time budget: what breaks costs its section only, and results are written as they come."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.hardware import choose_device, choose_dtype
from splitwiser_lab.measure.document import Document
from splitwiser_lab.measure.gpu_suite.efficiency import efficiency
from splitwiser_lab.measure.gpu_suite.host_bound import host_bound
from splitwiser_lab.measure.gpu_suite.job import Job
from splitwiser_lab.measure.gpu_suite.kernels import kernels
from splitwiser_lab.measure.gpu_suite.overlap_map import overlap_map
from splitwiser_lab.measure.gpu_suite.plan import (
    DEFAULT_SHAPES,
    FULL,
    HOST_BOUND_SHAPE,
    SECTIONS,
    SMALL,
    WEIGHTS,
    ChatLimits,
    Plan,
    SectionName,
)
from splitwiser_lab.measure.gpu_suite.rivals import rivals
from splitwiser_lab.measure.gpu_suite.sweep import sweep
from splitwiser_lab.measure.gpu_suite.verdicts import Verdict, verdicts
from splitwiser_lab.measure.mode_spec import ModeSpec
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.model.shapes import SHAPES
from splitwiser_lab.predict.ceilings import Ceilings, measure_ceilings

SCHEMA = "splitwiser-lab/gpu-suite/1"
_RUNS: dict[SectionName, Callable[[Job], None]] = {
    "efficiency": efficiency,
    "overlap": overlap_map,
    "sweep": sweep,
    "peers": rivals,
    "kernels": kernels,
    "hostbound": host_bound,
}


@dataclass
class Suite(Document):
    """What to run, and what was found so far. `path` is rewritten after each row.

    Of the sweep: `modes` (empty: all), `rates` as parts of the capacity (empty: the plan's), and `capacity` in
    requests/s (None: measured), so that several calls can measure parts of one sweep, which `join` puts together.
    Of the gain map: the first so many `loads` (0: all).
    """

    shapes: Sequence[str] = DEFAULT_SHAPES
    sections: Sequence[SectionName] = SECTIONS
    device: str = "auto"
    dtype: str = "auto"
    repeats: int = 3
    seconds: float = 500.0
    plan: Plan | None = None
    limits: ChatLimits = field(default_factory=ChatLimits)
    vllm: str | None = None
    path: Path | None = None
    record: Path | None = None
    modes: Sequence[str] = ()
    rates: Sequence[float] = ()
    capacity: float | None = None
    loads: int = 0
    report: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        unknown = [section for section in self.sections if section not in SECTIONS]
        if unknown or not self.sections or not self.shapes:
            raise WorkloadError(
                f"unknown sections {unknown}: choose some of {', '.join(SECTIONS)}, and a shape or more."
            )
        if self.repeats < 1 or self.seconds <= 0 or self.loads < 0:
            raise WorkloadError(
                f"repeats={self.repeats}, seconds={self.seconds}, loads={self.loads}: give 1 repeat and some seconds, "
                "and no less than 0 loads."
            )
        self._device = choose_device(self.device).value
        self._dtype = choose_dtype(self._device, self.dtype).value
        self._plan = self.plan or (SMALL if self._device == "cpu" else FULL)
        if self.rates:
            self._plan = replace(self._plan, sweep_fractions=tuple(self.rates))
        if min([*self.rates, 1.0 if self.capacity is None else self.capacity]) <= 0:
            raise WorkloadError(f"rates={list(self.rates)}, capacity={self.capacity}: give numbers above 0.")
        for mode in self.modes:
            ModeSpec.parse(mode).check(self._device)
        self._origin = provenance(self._device)
        self._found: dict[str, dict[str, Any]] = {}
        self._ceilings: Ceilings | None = None

    def run(self) -> Suite:
        """Run all sections on all shapes, one engine after the other; return itself."""
        end = time.monotonic() + self.seconds
        todo = self._todo()
        engine: Engine | None = None
        try:
            for number, (shape, section) in enumerate(todo):
                left = sum(WEIGHTS[later] for _, later in todo[number:])
                deadline = time.monotonic() + max(0.0, end - time.monotonic()) * WEIGHTS[section] / left
                job = self._job(section, shape, deadline)
                with job.trying(f"the section {section}"):
                    if engine is not None and (section == "hostbound" or engine.model.name != shape):
                        engine.close()
                        engine = None
                        _forget()
                    if section != "hostbound":
                        engine = engine or self._load(shape)
                        job.engine_or_none, job.ceilings = engine, self._ceilings
                    _RUNS[section](job)
        finally:
            self._write()
            if engine is not None:
                engine.close()
        return self

    def _todo(self) -> list[tuple[str, SectionName]]:
        """Shapes with their sections, in order. A profiler may stay attached to the process, so it comes after all
        that is timed here, with the last shape first, which is still loaded.
        """
        timed = [
            section for section in SECTIONS if section in self.sections and section not in ("kernels", "hostbound")
        ]
        todo: list[tuple[str, SectionName]] = [(shape, section) for shape in self.shapes for section in timed]
        if "kernels" in self.sections:
            todo += [(shape, "kernels") for shape in reversed(self.shapes)]
        if "hostbound" in self.sections:  # in processes of its own
            todo.append((HOST_BOUND_SHAPE, "hostbound"))
        return todo

    def verdicts(self) -> list[Verdict]:
        """The figures to reach, judged."""
        return verdicts(self._document())

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, with the verdicts."""
        return {**self._document(), "verdicts": [verdict.to_dict() for verdict in self.verdicts()]}

    def _document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "device": self._device,
            "dtype": self._dtype,
            "random_weights": [shape for shape in self.shapes if shape in SHAPES],
            "shapes": [_name(shape) for shape in self.shapes],
            "repeats": self.repeats,
            "limits": asdict(self.limits),
            "plan": asdict(self._plan),
            "ceilings": asdict(self._ceilings) if self._ceilings else None,
            "sections": self._found,
            **self._origin,
        }

    def _job(self, section: SectionName, shape: str, deadline: float) -> Job:
        job = Job(
            section=section,
            model=shape,
            shape=_name(shape),
            plan=self._plan,
            limits=self.limits,
            repeats=self.repeats,
            deadline=deadline,
            report=self.report,
            written=self._write,
            device=self._device,
            dtype=self._dtype,
            vllm=self.vllm,
            record=self.record,
            modes=self.modes,
            capacity=self.capacity,
            loads=self.loads,
            origin=self._origin,
        )
        self._found.setdefault(section, {})[job.shape] = {"rows": job.rows, "left_out": job.left_out}
        return job

    def _load(self, shape: str) -> Engine:
        self.report(f"loading {shape}")
        if self._ceilings is None:
            self._ceilings = measure_ceilings(self._device, self._dtype)
        return Engine.from_pretrained(
            shape, device=self._device, dtype=self._dtype, kv_tokens=self._plan.kv_tokens, report=self.report
        )

    def _write(self) -> None:
        if self.path is not None:
            self.to_json(self.path)


def _name(model: str) -> str:
    """How a model is called in the results: of a local folder only its name."""
    return Path(model).name if Path(model).is_absolute() else model


def _forget() -> None:
    """Give the GPU memory of a closed engine back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
