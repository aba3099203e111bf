"""Each phase of the pipeline alone, again and again, while the hardware is watched: what the paper profiled.

Both phases run in this process, by the functions that the workers run. On a GPU each pass lies in an NVTX range
with the name of its phase, by which Nsight Compute finds it (`measure/ncu.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from splitwiser_lab.errors import RequestError
from splitwiser_lab.measure.monitor import Monitor
from splitwiser_lab.measure.sources import Sample
from splitwiser_lab.pipelines.kv import KVLayout, store, view
from splitwiser_lab.pipelines.phase_figures import PhaseFigures
from splitwiser_lab.pipelines.phases import Phases, PromptBatch
from splitwiser_lab.shared_memory import allocate
from splitwiser_lab.timeline import Phase

_INTERVAL_S = 0.12  # between two looks: GPM's counters need 0.1 s between their samples
_WATCHED = {"sm": "SMs at work", "dram": "DRAM bandwidth", "memory": "memory in use"}  # metric -> what it is called


def profile_phases(
    model: Any, layout: KVLayout, device: str, batch: PromptBatch, seconds: float = 1.0
) -> tuple[PhaseFigures, PhaseFigures]:
    """Prefill, then all decode steps of `batch`, each again and again for `seconds` (0: once, and nothing is watched).

    `layout` is what `model` keeps of a token. Raises RequestError when no row of the batch wants a second token.
    """
    if max(batch.new_tokens) < 2:
        raise RequestError("decode makes the second token and those after it: ask for 2 new tokens or more.")
    phases = Phases(model)
    passes = _Passes(phases, batch, layout, device)
    passes.prefill()  # warms up, and leaves what decode begins with
    passes.decode()
    turns: dict[Phase, Callable[[], list[float]]] = {"prefill": passes.prefill, "decode": passes.decode}
    spans: dict[Phase, tuple[float, float]] = {}
    samples: dict[Phase, list[float]] = {}
    with Monitor(device, _INTERVAL_S, sources=None if seconds > 0 else ()) as monitor:
        for phase, once in turns.items():
            begun = time.perf_counter()
            samples[phase] = once()
            while time.perf_counter() - begun < seconds:
                samples[phase] += once()
            spans[phase] = (begun, time.perf_counter())
    prompt, new = batch.longest, max(batch.new_tokens)
    shapes: dict[Phase, tuple[int, int]] = {
        "prefill": (prompt, prompt),
        "decode": (prompt + new // 2, prompt + new - 1),
    }
    found: list[PhaseFigures] = []
    for phase, (tokens, kept) in shapes.items():
        sm, dram, memory = (mean_inside(monitor.samples, key, *spans[phase]) for key in _WATCHED)
        missing = _missing(monitor, (sm, dram, memory)) if seconds > 0 else {}
        kv_bytes, each = layout.nbytes(len(batch.prompts), kept), tuple(samples[phase])
        found.append(PhaseFigures(phase, len(batch.prompts), tokens, each, kv_bytes, sm, dram, memory, missing))
    return found[0], found[1]


def _missing(monitor: Monitor, watched: tuple[float | None, ...]) -> dict[str, str]:
    """What was not told, and why; `watched` has the values in the order of `_WATCHED`."""
    told = {metric.key: metric.reason for metric in monitor.metrics}
    short = "there were no two samples in that time, watch it longer"
    return {
        name: (told[key] or short) if key in told else "only a GPU counts it"
        for (key, name), value in zip(_WATCHED.items(), watched, strict=True)
        if value is None
    }


def mean_inside(samples: Sequence[Sample], key: str, start: float, end: float) -> float | None:
    """Mean of a metric over the samples whose time since the sample before lies wholly in [start, end]; None is N/A."""
    values = [
        value
        for before, sample in pairwise(samples)
        if before.time >= start and sample.time <= end and (value := sample.values.get(key)) is not None
    ]
    return sum(values) / len(values) if values else None


class _Passes:
    """One pass of each phase over the same batch; decode always begins with what the last prefill left."""

    def __init__(self, phases: Phases, batch: PromptBatch, layout: KVLayout, device: str) -> None:
        self._phases, self._batch, self._layout = phases, batch, layout
        self._on_gpu = torch.device(device).type == "cuda"
        self._kept = allocate(layout.nbytes(len(batch.prompts), batch.longest), device)
        self._stored: Any = None
        self._first: list[int] = []

    def prefill(self) -> list[float]:
        """Seconds of the whole prefill, to its tokens on the host."""
        start = time.perf_counter()
        with self._named("prefill"):
            tokens, cache = self._phases.prefill(self._batch)
            self._first = tokens.tolist()  # waits for the device
        seconds = time.perf_counter() - start
        if self._stored is None:
            self._stored = store(cache, self._kept, 0)
        return [seconds]

    def decode(self) -> list[float]:
        """Seconds of each decode step."""
        cache = view(self._stored, self._layout, self._phases.model.config, self._kept, 0)
        with self._named("decode"):
            return [step.end - step.start for step in self._phases.decode(self._batch, cache, self._first)]

    @contextmanager
    def _named(self, phase: Phase) -> Iterator[None]:
        if not self._on_gpu:
            yield
            return
        torch.cuda.nvtx.range_push(phase)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()
