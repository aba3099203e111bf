"""Open loop: requests are admitted when the workload says they arrive, whether or not the engine keeps up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from splitwiser_lab.engine.core import Core
from splitwiser_lab.engine.intake import Intake
from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import RequestError


class Arriving(Protocol):
    """What is read of each request of a workload; times are seconds after the start."""

    arrival_s: float
    prompt: str | list[int]
    max_new_tokens: int
    ignore_eos: bool


class OpenLoop:
    """Feeds the requests of a workload to the core as they come due, until all are done or time is up."""

    def __init__(
        self, core: Core, intake: Intake, due: Sequence[Arriving], seed: int, origin: float, seconds: float | None
    ) -> None:
        self.requests: list[Request] = []
        self._core, self._intake, self._due = core, intake, due
        self._seed, self._origin, self._seconds = seed, origin, seconds

    def admit(self) -> float | None:
        """Admit what has come due; return the seconds until the next one does, or None when there is no next."""
        while self._next is not None and self._next.arrival_s <= self._now and not self._out_of_time:
            self.requests.append(self._request(self._next, len(self.requests)))
        return None if self._next is None else max(0.0, self._next.arrival_s - self._now)

    def over(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self._out_of_time or (self._next is None and all(request.done for request in self.requests))

    @property
    def _now(self) -> float:
        return time.perf_counter() - self._origin

    @property
    def _next(self) -> Arriving | None:
        return self._due[len(self.requests)] if len(self.requests) < len(self._due) else None

    @property
    def _out_of_time(self) -> bool:
        return self._seconds is not None and self._now >= self._seconds

    def _request(self, item: Arriving, number: int) -> Request:
        """Let one in; one that cannot be served is refused and recorded, and the others go on."""
        arrival = self._origin + item.arrival_s
        sampling: dict[str, Any] = {"max_new_tokens": item.max_new_tokens, "ignore_eos": item.ignore_eos}
        try:
            request = self._intake.request(item.prompt, arrival, None, {**sampling, "seed": self._seed + number})
            self._core.add(request)
        except RequestError as error:
            request = self._intake.refused(arrival, error)
        return request
