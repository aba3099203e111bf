"""The loop: ask the policies for batches, submit them to lanes, fold the results back into requests.

This is the same loop in every mode. It knows lanes by their interface and modes by their policies; it
does not know what a GPU, a process or a widget is. Everything that other threads may ask for (a new
request, a cancellation, another mode) waits in a queue until the next step begins.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request
from splitwiser_lab.engine.scheduler import Limits, Scheduler, decode_only
from splitwiser_lab.engine.station import ModeSwitch, Station
from splitwiser_lab.errors import LaneError, SplitwiserError, not_a_number
from splitwiser_lab.lanes.base import Lane, wait_any
from splitwiser_lab.model.batch import NOT_A_NUMBER
from splitwiser_lab.timeline import FinishReason, ModeChange, Span

_KEPT_SPANS = 200_000
_IDLE_SECONDS = 0.05  # how long an idle loop sleeps before it looks for commands again
_YIELD_SECONDS = 1e-4  # between two steps when other threads want to drive too


class Core:
    """Requests, pages, lanes and the loop. One thread at a time drives it; any thread may ask for things."""

    def __init__(self, pages: PageAllocator, limits: Limits, ends: Callable[[Request], FinishReason | None]) -> None:
        """`ends` says whether a request's newest token ends it, and why."""
        self.scheduler = Scheduler(pages, limits)
        self.spans: deque[Span] = deque(maxlen=_KEPT_SPANS)
        self.modes: list[ModeChange] = []
        self.closed = False
        self._ends = ends
        self._stations: list[Station] = []
        self._switch: ModeSwitch | None = None
        self._controller: Callable[[], ModeSwitch | None] | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()
        self._drivers: set[int] = set()
        self._stepping = False

    @property
    def mode(self) -> ModeChange:
        """The mode under which batches are scheduled now."""
        return self.modes[-1]

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that have batches now, and those that will after the switch that waits."""
        switch = self._switch
        return [station.lane for station in [*self._stations, *(switch.stations if switch else [])]]

    @property
    def quiet(self) -> bool:
        """Whether there is nothing left to do."""
        return not self.scheduler.running and not self.scheduler.waiting and not self._commands

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._command(lambda: self.scheduler.add(request))

    def cancel(self, request: Request) -> None:
        """End a request at the next step boundary; what it has generated stays."""
        request.cancel_requested = True
        self._command(lambda: self._end_if_cancelled(request))

    def switch(self, switch: ModeSwitch) -> None:
        """Change lanes and policies as soon as the batches under way are done."""

        def pend() -> None:
            self._switch = switch

        self._command(pend)

    def drive(self, done: Callable[[], bool], before_step: Callable[[], float | None] | None = None) -> None:
        """Step until `done`. `before_step` may add requests; it returns seconds until it has more to add, or None."""
        me = threading.get_ident()
        self._drivers.add(me)
        try:
            while True:
                with self._lock:
                    timeout = before_step() if before_step else None
                    if done():
                        if self.quiet:
                            self._drain()  # what ran ahead for requests that have ended
                        break
                    if self.closed:
                        raise SplitwiserError("the engine was closed while requests were under way.")
                    if not self.step(timeout):
                        time.sleep(min(_IDLE_SECONDS, timeout if timeout is not None else _IDLE_SECONDS))
                if len(self._drivers) > 1:
                    time.sleep(_YIELD_SECONDS)  # else the lock comes back to this thread again and again
        except BaseException:
            with self._lock:
                self._drain()  # whatever was interrupted, the next call finds no request half way
            raise
        finally:
            self._drivers.discard(me)
        self._run_commands_if_idle()

    def step(self, timeout: float | None = None) -> bool:
        """Submit what can be submitted, wait for one batch (at most `timeout` seconds), fold results back.

        Returns False when there was nothing to do.
        """
        with self._lock:
            self._stepping = True
            try:
                self._run_commands()
                if self._switch is None and self._controller is not None:
                    self._switch = self._controller()
                if self._switch is None:
                    self._submit(self._stations)
                else:
                    self._submit([station for station in self._stations if self._decodes_on(station)])
                oldest = [station.under_way[0][1] for station in self._stations if station.under_way]
                if not oldest:
                    return self._settle_idle()
                wait_any(oldest, timeout)
                self._fold()
                return True
            finally:
                self._stepping = False

    @contextmanager
    def at_rest(self) -> Iterator[bool]:
        """Whether no batch is under way; if so, none begins in this block. Does not wait for a thread that drives."""
        free = self._lock.acquire(blocking=False)
        try:
            yield free and not any(station.under_way for station in self._stations)
        finally:
            if free:
                self._lock.release()

    def abandon(self, requests: Sequence[Request]) -> None:
        """End those of `requests` that are not done, as cancelled."""
        if all(request.done for request in requests):
            return
        with self._lock:
            self._run_commands()
            self._drain()
            for request in requests:
                if not request.done:
                    self._end(request, "cancelled")

    def _drain(self) -> None:
        """Wait for the batches under way and fold them back; submit nothing new."""
        for station in self._stations:
            while station.under_way:
                self._finish_batch(station)
        self.scheduler.forget_under_way()  # an interrupt may have come between choosing and folding back

    def _decodes_on(self, station: Station) -> bool:
        """Before a switch, tokens go on coming while another lane still has a batch to finish, perhaps a long one."""
        others = any(other.under_way for other in self._stations if other is not station)
        return station.policy is decode_only and others

    def _submit(self, stations: Sequence[Station]) -> None:
        """Keep these lanes as busy as they can be: one that takes the tokens of its last batch itself runs ahead."""
        for station in stations:
            lane = station.lane
            while len(station.under_way) < lane.depth:
                scheduled = station.policy(self.scheduler, lane.name)
                if scheduled is None:
                    break
                now = time.perf_counter()
                for request in scheduled.requests:
                    request.scheduled = request.scheduled or now
                try:
                    station.under_way.append((scheduled, lane.submit(scheduled.batch)))
                except LaneError as error:
                    for request in scheduled.requests:
                        request.under_way.pop()
                    self._fail(scheduled.requests, error)
                except BaseException:
                    self._give_up(station)  # it may have begun: its answer would be taken for the next one's
                    raise

    def _give_up(self, station: Station) -> None:
        """Close a lane whose answers fit no question any more; requests go on from before its batches."""
        station.under_way.clear()
        station.lane.close()

    def _settle_idle(self) -> bool:
        """With no batch under way: switch modes if asked, and tell a quiet engine from a stuck one."""
        if self._switch is not None:
            switch, self._switch = self._switch, None
            self._stations, self.scheduler.limits = switch.stations, switch.limits
            self._controller = switch.controller
            for station in self._stations:
                station.lane.cores = switch.cores.get(station.lane.name, [])
            self.modes.append(replace(switch.change, time=time.perf_counter()))
            return True
        if not self.quiet:
            stuck = [request.id for request in (*self.scheduler.running, *self.scheduler.waiting)]
            raise SplitwiserError(f"requests {stuck} are left but no lane can run them: this is a bug, report it.")
        return False

    def _fold(self) -> None:
        for station in self._stations:
            if station.under_way and station.under_way[0][1].done():
                self._finish_batch(station)

    def _finish_batch(self, station: Station) -> None:
        """Fold the oldest batch back. What it computed for requests that have ended meanwhile is dropped."""
        try:
            scheduled, ticket = station.under_way.popleft()
            batch, requests = scheduled.batch, scheduled.requests
            result = ticket.result()
        except LaneError as error:
            for request in requests:
                request.under_way.popleft()
            self._fail(requests, error)
            return
        except BaseException:
            self._give_up(station)  # an answer half read: what follows in the pipe makes no sense
            raise
        now, lane = time.perf_counter(), station.lane.name
        counts = (batch.prefill_tokens, len(batch.decode), len(requests))
        cost = (batch.context_tokens, batch.attended_pairs, sum(token is not None for token in result.tokens))
        self.spans.append(Span(lane, batch.phase, result.start, result.end, *counts, self.mode.mode, *cost))
        heard: list[tuple[Request, int | None]] = []
        for number, (request, token) in enumerate(zip(requests, result.tokens, strict=True)):
            part = request.under_way.popleft()
            if request.done:
                self.scheduler.came_back(request)
                continue
            request.computed = part.context
            if token == NOT_A_NUMBER:
                self._end(request, "error", not_a_number(lane, len(request.output) + 1))
                continue
            heard.append((request, token))
            if token is not None:
                request.output.append(token)
                request.token_times.append(now)
                if number >= len(batch.decode):
                    request.hand_off = now  # its block table is all that decode needs: nothing moves
                if reason := self._ends(request):
                    self._end(request, reason)
        for request, token in heard:
            if token is not None:
                self._announce(request, token)
            if request.cancel_requested and not request.done:
                self._end(request, "cancelled")

    def _announce(self, request: Request, token: int) -> None:
        """Tell whoever listens. A listener may do anything, even cancel, close or interrupt."""
        try:
            if request.on_token:
                request.on_token(request, token)
        except Exception as error:  # the listener's own fault: it costs this request and no other
            if not request.done:
                self._end(request, "error", error)
            request.error = error

    def _end_if_cancelled(self, request: Request) -> None:
        if request.cancel_requested and not request.under_way and not request.done:
            self._end(request, "cancelled")

    def _end(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        self.scheduler.remove(request)
        request.finish(reason, time.perf_counter(), error)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        for request in requests:
            if request.done:
                self.scheduler.came_back(request)
            else:
                self._end(request, "error", error)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._run_commands_if_idle()

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _run_commands_if_idle(self) -> None:
        """Run what waits, unless a thread is driving: it will. Checked after queueing, and after each drive."""
        while (self._commands or self._can_switch) and not self._stepping and self._lock.acquire(blocking=False):
            try:
                self._run_commands()
                if self._can_switch:
                    self._settle_idle()
            finally:
                self._lock.release()

    @property
    def _can_switch(self) -> bool:
        return self._switch is not None and not any(station.under_way for station in self._stations)

    def close(self) -> list[Lane]:
        """Refuse all further work and return the lanes in use."""
        self.closed = True
        with self._lock:
            self._drain()
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                self._end(request, "cancelled")
            lanes = [station.lane for station in self._stations]
            self._stations, self._switch, self._controller = [], None, None  # they hold the weights and the pool
            return lanes
