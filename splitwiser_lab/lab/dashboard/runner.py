"""The thread behind the live lab: lets requests in as they come, runs them, and has their tokens checked.

What changes the work itself (lengths of prompts and outputs) lets the requests in flight finish, asks the reference
about the new prompts, and goes on. Everything else acts in mid-run. It draws nothing and waits for nobody.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import SplitwiserError
from splitwiser_lab.lab.dashboard.flips import Flips
from splitwiser_lab.lab.dashboard.frame import State, TokenLine
from splitwiser_lab.lab.dashboard.knobs import rounded_rate
from splitwiser_lab.lab.dashboard.stretches import Stretches
from splitwiser_lab.lab.dashboard.traffic import (
    Task,
    Traffic,
    base_texts,
    poisson_gaps,
    tasks_of,
    tasks_of_length,
    workload_gaps,
)
from splitwiser_lab.measure.judge import TokenJudge
from splitwiser_lab.measure.reference import Reference
from splitwiser_lab.measure.workload import Workload

_KEPT = 4000  # requests, and readings of the pool
_MOST_WAITING = 100  # requests that may queue before arrivals pause
_KV_EVERY_S = 0.1
_LOAD = 0.8  # share of the sequential engine's time that the first rate asks for
_WARM_UP_TOKENS = 8
_JOIN_SECONDS = 30.0


class Runner:
    """Runs an endless stream of requests on an engine while it is told to; `clock` is the view's, in seconds."""

    def __init__(
        self,
        engine: Engine,
        workload: Workload | None,
        reference: Any,
        flips: Flips,
        stretches: Stretches,
        clock: Callable[[], float],
    ) -> None:
        """`reference` is the transformers model to compare with; None loads it from the engine's folder."""
        self._engine, self._workload, self._reference = engine, workload, reference
        self._flips, self._stretches, self._clock = flips, stretches, clock
        self._texts = base_texts(engine) if workload is None else []
        self._judge: TokenJudge | None = None
        self._traffic: Traffic | None = None
        self._requests: deque[Request] = deque(maxlen=_KEPT)
        self._live: dict[Request, Task] = {}
        self._kv: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=_KEPT)
        self._failed, self._failure = 0, ""
        self._go, self._wake, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._changed = True  # the work itself: prompts and lengths
        self._thread: threading.Thread | None = None
        self.state: State = "ready"
        self.message = ""
        self.stopped_at: float | None = 0.0

    @property
    def requests(self) -> list[Request]:
        """The latest requests, finished ones too."""
        return list(self._requests)

    @property
    def kv(self) -> list[tuple[float, float]]:
        """(moment, share of the pool in use)."""
        return list(self._kv)

    @property
    def waiting(self) -> int:
        """Requests that have come and were not scheduled yet."""
        return sum(request.scheduled is None for request in list(self._live))

    @property
    def running(self) -> int:
        """Requests that have been scheduled and are not done."""
        return len(self._live) - self.waiting

    @property
    def tokens(self) -> TokenLine:
        """Whether the tokens of all finished requests equal the reference's."""
        if self._judge is None:
            return TokenLine(None, "the reference has not been asked yet.")
        failed = f" {self._failed} failed, the latest: {self._failure}" if self._failed else ""
        return TokenLine(self._judge.verdict.holds, f"{self._judge.verdict}{failed}")

    def start(self) -> None:
        """Run, if it does not. Raises SplitwiserError after `close`."""
        if self._closed.is_set():
            raise SplitwiserError("this live view is closed: call lab.live again.")
        if self.state in ("ready", "stopped", "failed"):
            self.state, self.stopped_at = "preparing", None
        self._go.set()
        if self._thread is None or not self._thread.is_alive():
            self._changed = True
            self._thread = threading.Thread(target=self._work, name="splitwiser-lab-workload", daemon=True)
            self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Cancel what is under way and rest; returns at once."""
        self._go.clear()
        self._cancel_all()
        self._wake.set()

    def close(self) -> None:
        """Stop, and wait for the thread to end."""
        self._closed.set()
        self.stop()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    def work_changed(self) -> None:
        """The settings ask for other prompts or lengths: change over as soon as the requests in flight are done."""
        self._changed = True
        self._wake.set()

    def _work(self) -> None:
        """The thread that submits and runs the requests."""
        try:
            while not self._closed.is_set():
                if not self._go.is_set():
                    self._rest()
                elif self._changed:
                    self._prepare()
                else:
                    self._run()
        except Exception as error:  # whatever it was, the view must say it
            self.state, self.message = "failed", f"The run ended: {error}"
            self.stopped_at = self._clock()
            self._go.clear()
        finally:
            self._cancel_all()

    def _rest(self) -> None:
        """Stopped: requests that were under way end as cancelled."""
        if self._live:
            self._engine.run()
            self._sweep()
        self._kv.append((self._clock(), self._engine.kv_use))
        if self.stopped_at is None:
            self.state, self.message, self.stopped_at = "stopped", "", self._clock()
        self._wake.wait()
        self._wake.clear()
        if self._go.is_set() and not self._changed:
            self._begin()

    def _run(self) -> None:
        """One round: let in what has come, and carry out all that is there; more comes in meanwhile."""
        self._admit()
        if self._live:
            self._engine.run()
            self._sweep()
        assert self._traffic is not None
        self._note_kv()
        self._wake.wait(min(0.2, max(0.0, self._traffic.next - time.perf_counter())))
        self._wake.clear()

    def _prepare(self) -> None:
        """Ask the reference about the prompts and measure each phase alone; the engine is at rest meanwhile."""
        self.state, self._changed = "preparing", False
        settings = self._flips.settings
        tasks = (
            tasks_of_length(self._texts, settings.prompt_tokens, settings.output_tokens)
            if self._workload is None
            else tasks_of(self._workload, self._engine)
        )
        if self._judge is None:
            self.message = "Loading the reference, transformers with the same weights ..."
            self._judge = TokenJudge(Reference(self._reference or self._engine.model.reference()))
        different = list(dict.fromkeys(tasks))
        for number, task in enumerate(different, start=1):
            if self._closed.is_set() or not self._go.is_set():
                self._changed = True
                return
            self.message = f"Asking transformers what the tokens should be: prompt {number} of {len(different)} ..."
            self._judge.learn(task.prompt, task.new_tokens, task.ignore_eos)
        self.message = "Timing each phase alone ..."
        with self._flips.held():
            alone = self._stretches.calibrate(self._engine, different, _WARM_UP_TOKENS)
        if settings.rate is None and alone is not None:
            longest = max(alone.request_seconds(len(task.prompt), task.new_tokens) for task in different)
            self._flips.settings = replace(self._flips.settings, rate=rounded_rate(_LOAD / longest))
        self._flips.settle()
        gaps = poisson_gaps() if self._workload is None else workload_gaps(self._workload)
        self._traffic = Traffic(tasks, gaps, self._flips.settings.rate or 1.0, time.perf_counter())
        self._begin()

    def _begin(self) -> None:
        assert self._traffic is not None
        self._traffic.resume(time.perf_counter())
        self._stretches.begin(self._clock(), self._engine.mode)
        self.state, self.message = "running", ""

    def _admit(self) -> None:
        """Let in the requests that have come, unless the run ends or their lengths are about to change."""
        now, traffic = time.perf_counter(), self._traffic
        if traffic is None or self._changed or not self._go.is_set() or self._closed.is_set():
            return
        if self._flips.settings.rate and self._flips.settings.rate != traffic.rate:
            traffic.set_rate(self._flips.settings.rate, now)
        if self.waiting >= _MOST_WAITING:
            traffic.resume(now)
            self.message = f"{_MOST_WAITING} requests wait, so no new ones are let in: lower the rate."
            return
        self.message = ""
        for arrival, task in traffic.due(now):
            request = self._engine.submit(
                list(task.prompt),
                max_new_tokens=task.new_tokens,
                ignore_eos=task.ignore_eos,
                on_token=self._on_token,
                arrival=arrival,
            )
            self._live[request] = task
            self._requests.append(request)

    def _on_token(self, request: Request, token: int) -> None:
        """Called between steps, on the thread that runs the engine."""
        if request.done:
            self._finished(request)
        self._note_kv()
        self._admit()

    def _sweep(self) -> None:
        """Forget requests that ended without a token to tell of it: failed or cancelled ones."""
        for request in [request for request in self._live if request.done]:
            self._finished(request)

    def _finished(self, request: Request) -> None:
        task = self._live.pop(request, None)
        if task is None or self._judge is None:
            return
        if request.finish_reason in ("stop", "length"):
            self._judge.judge(task.prompt, request.output, task.new_tokens, task.ignore_eos)
        elif request.finish_reason == "error":
            self._failed += 1
            self._failure = str(request.error)

    def _cancel_all(self) -> None:
        for request in list(self._live):
            self._engine.cancel(request)

    def _note_kv(self) -> None:
        if self._clock() - self._kv[-1][0] >= _KV_EVERY_S:
            self._kv.append((self._clock(), self._engine.kv_use))
