"""Each phase of the pipeline alone, again and again, while the hardware is watched: what the paper profiled.

Both phases run in this process, by the functions that the workers run. On a GPU each pass lies in an NVTX range
with the name of its phase, by which Nsight Compute finds it (`measure/ncu.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from splitwiser_lab.errors import RequestError
from splitwiser_lab.measure.monitor import open_sources
from splitwiser_lab.measure.sources import Source
from splitwiser_lab.pipelines.kv import KVLayout, store, view
from splitwiser_lab.pipelines.phase_figures import PhaseFigures
from splitwiser_lab.pipelines.phases import Phases, PromptBatch
from splitwiser_lab.shared_memory import allocate
from splitwiser_lab.timeline import Phase

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
    samples: dict[Phase, list[float]] = {}
    watches: dict[Phase, _Watch] = {}
    for phase, once in turns.items():
        with _watching(device if seconds > 0 else None) as watches[phase]:
            begun = time.perf_counter()
            samples[phase] = once()
            while time.perf_counter() - begun < seconds:
                samples[phase] += once()
    prompt, new = batch.longest, max(batch.new_tokens)
    shapes: dict[Phase, tuple[int, int]] = {
        "prefill": (prompt, prompt),
        "decode": (prompt + new // 2, prompt + new - 1),
    }
    found: list[PhaseFigures] = []
    for phase, (tokens, kept) in shapes.items():
        sm, dram, memory = (watches[phase].values.get(key) for key in _WATCHED)
        missing = watches[phase].missing() if seconds > 0 else {}
        kv_bytes, each = layout.nbytes(len(batch.prompts), kept), tuple(samples[phase])
        found.append(PhaseFigures(phase, len(batch.prompts), tokens, each, kv_bytes, sm, dram, memory, missing))
    return found[0], found[1]


class _Watch:
    """Reads the hardware at the start and at the end of a stretch: a counter then tells the mean over all of it.

    A thread that looks again and again would take part in what it measures; and a GPU's readings take so long that
    one that keeps its share of a core small looks but once a second.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self.values: dict[str, float | None] = {}
        for source in reversed(sources):  # the first are the GPU's counters: nothing lies between them and the stretch
            source.read()

    def end(self) -> None:
        """The stretch ends now."""
        self.values = {key: value for source in self._sources for key, value in source.read().items()}

    def missing(self) -> dict[str, str]:
        """What of the watched was not told, and why."""
        told = {metric.key: metric.reason for source in self._sources for metric in source.metrics()}
        short = "counters tell a mean over 0.1 s or more, watch it longer"
        return {
            name: (told[key] or short) if key in told else "only a GPU counts it"
            for key, name in _WATCHED.items()
            if self.values.get(key) is None
        }


@contextmanager
def _watching(device: str | None) -> Iterator[_Watch]:
    """Watch `device` while the block runs (None: nothing is watched)."""
    sources = open_sources(device) if device else []
    try:
        watch = _Watch(sources)
        yield watch
        watch.end()
    finally:
        for source in sources:
            source.close()


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
