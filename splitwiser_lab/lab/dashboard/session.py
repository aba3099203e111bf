"""A running engine as a source of frames: requests keep coming, the mode can be flipped, tokens are checked.

The requests have a thread of their own (`runner`), changes of mode another (`flips`), because starting lanes takes a
while, and the monitor a third. Whoever draws only reads what they left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import supported_modes
from splitwiser_lab.hardware import ModeSupport, describe
from splitwiser_lab.lab.dashboard.flips import Flips
from splitwiser_lab.lab.dashboard.frame import Frame, Part
from splitwiser_lab.lab.dashboard.knobs import (
    BATCH,
    CHUNK,
    OUTPUT,
    PROMPT,
    RATE,
    Settings,
    hardware_lines,
    knobs_of,
)
from splitwiser_lab.lab.dashboard.runner import Runner
from splitwiser_lab.lab.dashboard.shares import SHARE, share_option
from splitwiser_lab.lab.dashboard.source import Knob
from splitwiser_lab.lab.dashboard.stretches import Stretches
from splitwiser_lab.measure.monitor import Monitor
from splitwiser_lab.measure.workload import Workload

_READINGS_EVERY_S = 0.2


class Session:
    """An engine under endless traffic. Made stopped; `start` prepares (reference, warm-up) and runs."""

    def __init__(
        self,
        engine: Engine,
        workload: Workload | None = None,
        settings: Settings | None = None,
        reference: Any = None,
    ) -> None:
        """`reference` is the transformers model to compare with; None loads it from the engine's folder."""
        self._engine, self._workload = engine, workload
        self._support = supported_modes(engine.device)
        gpu = str(engine.device).startswith("cuda")
        self._window, self._horizon = (6.0, 10.0) if gpu else (20.0, 30.0)
        self._origin = time.perf_counter()
        self._heading = _heading(engine)
        self._monitor = Monitor(engine.device, interval_s=_READINGS_EVERY_S)
        self._lines = tuple(hardware_lines(self._monitor.metrics))
        chosen = settings or Settings(mode=engine.mode)
        if workload is not None and chosen.rate is None:
            chosen = replace(chosen, rate=workload.describe()["requests_per_s"])
        self._flips, self._stretches = Flips(engine, chosen), Stretches(self._horizon)
        self._runner = Runner(engine, workload, reference, self._flips, self._stretches, self._now)
        self._watching = False

    @property
    def settings(self) -> Settings:
        """What is set now, to begin the next session with."""
        return self._flips.settings

    @property
    def modes(self) -> Sequence[ModeSupport]:
        return self._support

    @property
    def mode(self) -> str:
        return self.settings.mode

    @property
    def knobs(self) -> Sequence[Knob]:
        return knobs_of(self.settings, self._engine, self._workload is not None)

    @property
    def active(self) -> bool:
        return self._runner.state in ("preparing", "running")

    def start(self) -> None:
        self._runner.start()
        if not self._watching:
            self._watching = True
            self._monitor.start()

    def stop(self) -> None:
        self._runner.stop()

    def close(self) -> None:
        self._flips.close()
        self._runner.close()
        self._monitor.stop()

    def choose(self, mode: str) -> None:
        if mode != self.mode:
            self._flips.wish(replace(self.settings, mode=mode))

    def turn(self, name: str, value: Any) -> None:
        settings, option = self.settings, share_option(self.mode, self._engine.device) if name == SHARE else name
        if name == RATE:
            self._flips.settings = replace(settings, rate=float(value))
        elif name == PROMPT:
            self._flips.settings = replace(settings, prompt_tokens=int(value))
            self._runner.work_changed()
        elif name == OUTPUT:
            self._flips.settings = replace(settings, output_tokens=int(value))
            self._runner.work_changed()
        elif option and name in (SHARE, CHUNK, BATCH):
            self._flips.wish(replace(settings, options={**settings.options, option: int(value)}))

    def frame(self) -> Frame:
        now = self._now() if self._runner.stopped_at is None else self._runner.stopped_at
        since = max(0.0, now - self._horizon)
        recent = [r for r in self._runner.requests if r.finished is None or r.finished - self._origin >= since]
        timeline = self._engine.timeline(self._origin + since, recent, self._origin)
        readings = tuple(
            replace(sample, time=sample.time - self._origin)
            for sample in self._monitor.samples
            if sample.time - self._origin >= since
        )
        kv = tuple(point for point in self._runner.kv if point[0] >= since)
        before, after = self._stretches.update(timeline, since, now)
        parts = tuple(
            Part(label, start, end, timeline, readings, kv)
            for label, start, end in self._stretches.between(max(0.0, now - self._window), now)
        )
        notes = (self._runner.message, self._flips.notice)
        return Frame(
            now=now,
            window=self._window,
            parts=parts,
            before=before,
            after=after,
            tokens=self._runner.tokens,
            state=self._runner.state,
            message=" ".join(note for note in notes if note),
            heading=self._heading,
            recorded=False,
            lines=self._lines,
            waiting=self._runner.waiting,
            running=self._runner.running,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._origin


def _heading(engine: Engine) -> str:
    machine = describe(engine.device)
    where = f"{machine.device_name}, {machine.cores} cores" if machine.device == "cpu" else machine.device_name
    dtype = str(engine.dtype).removeprefix("torch.")
    return f"Live: {engine.model.name} ({dtype}) on {where}, PyTorch {machine.torch}"
