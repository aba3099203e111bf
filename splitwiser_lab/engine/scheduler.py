"""Which requests run next, with which tokens.

The scheduler answers two questions, the next prefill batch and the next decode batch; a policy puts
them together for one lane. It knows no more of a lane than its name: a lane runs its batches in order,
so a request with a batch under way may be scheduled there again, and is left alone by all others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request
from splitwiser_lab.model.batch import Batch, Sequence
from splitwiser_lab.model.graph_shapes import MIXED_ROWS
from splitwiser_lab.timeline import Phase


@dataclass(frozen=True)
class Limits:
    """At most so many requests at once, and so many tokens in a prefill batch (a longer prompt goes alone).

    A mixed batch has up to `chunk_tokens`, of which decode tokens count in multiples of `decode_step`: a GPU pads
    them to that many, and what the padding takes is no room for prompts.
    """

    max_requests: int
    prefill_tokens: int
    chunk_tokens: int
    decode_step: int = 1

    def with_options(self, options: Mapping[str, Any]) -> Limits:
        """These, but for what the options of a mode ask for."""
        return replace(self, **{field: options[name] for name, field in _OPTIONS.items() if name in options})


_OPTIONS = {"max_batch": "max_requests", "prefill_tokens": "prefill_tokens", "chunk_tokens": "chunk_tokens"}
DEFAULT_LIMITS = {"cpu": Limits(32, 512, 128), "cuda": Limits(256, 8192, 512, MIXED_ROWS)}


@dataclass(frozen=True)
class Scheduled:
    """A batch, and the requests of its sequences in the same order."""

    batch: Batch
    requests: list[Request]


class Scheduler:
    """First come, first served. When pages run out, the youngest request gives its pages back and waits."""

    def __init__(self, pages: PageAllocator, limits: Limits) -> None:
        self.pages, self.limits = pages, limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # holds pages; in order of arrival
        self.leaving: list[Request] = []  # ended, but a batch under way still writes to their pages

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request and take its pages, at once or, while it is under way, when `came_back` says so."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if request.under_way:
            self.leaving.append(request)
        else:
            self.pages.release(request)

    def came_back(self, request: Request) -> None:
        """One batch fewer with this request is under way."""
        if request in self.leaving and not request.under_way:
            self.leaving.remove(request)
            self.pages.release(request)

    def forget_under_way(self) -> None:
        """Nothing is under way any more, whatever the requests say: what was not folded back is computed again."""
        for request in [*self.running, *self.leaving]:
            request.under_way.clear()
        for request in list(self.leaving):
            self.came_back(request)

    def next_prefill(
        self, token_budget: int, chunked: bool = False, lane: str | None = None
    ) -> list[tuple[Request, Sequence]]:
        """Requests and the part of each to prefill on `lane`: those begun first, then those waiting.

        With `chunked`, no more than `token_budget` tokens, splitting prompts; else whole prompts, at least one.
        """
        chosen: list[tuple[Request, Sequence]] = []
        for request in self._prefill_candidates(lane):
            count = request.length - request.reached
            if chunked:
                count = min(count, token_budget)
            if count == 0 or (chosen and count > token_budget):
                break
            if not self._make_room(request, request.reached + count):
                break
            chosen.append(self._take(request, count, lane))
            token_budget -= count
        return chosen

    def next_decode(self, lane: str | None = None) -> list[tuple[Request, Sequence]]:
        """All requests that can decode now on `lane`, one token each."""
        chosen: list[tuple[Request, Sequence]] = []
        for request in list(self.running):
            if self._ready(request, "decode", lane):
                if self._make_room(request, request.length):
                    chosen.append(self._take(request, 1, lane))
                elif any(other.under_way and other.lane == lane for other in self.running if other.id > request.id):
                    break  # the younger must come to rest on this lane, or they could never give way
        return chosen

    def _ready(self, request: Request, phase: Phase, lane: str | None) -> bool:
        preempted = not request.pages  # a moment ago, to make room for an older one
        elsewhere = request.under_way and (lane is None or request.lane != lane)
        return not preempted and not elsewhere and request.wants_more and request.phase == phase

    def _take(self, request: Request, count: int, lane: str | None) -> tuple[Request, Sequence]:
        part = request.next_tokens(count)
        request.under_way.append(part)  # from here on it cannot be preempted, nor scheduled elsewhere
        request.lane = lane
        return request, part

    def _prefill_candidates(self, lane: str | None) -> Iterator[Request]:
        for request in list(self.running):
            if self._ready(request, "prefill", lane):
                yield request
        while self.waiting and len(self.running) < self.limits.max_requests:
            yield self.waiting[0]

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Get the pages for `tokens` tokens. Who waits takes only what is free; who runs may preempt younger ones."""
        if not request.pages:  # a newcomer
            # Leave a page for each running request, or the newcomer would be preempted at their next page.
            if self.running and self.pages.needed(request, tokens) + len(self.running) > self.pages.free:
                return False
            if not self.pages.grow(request, tokens):
                return False
            self.running.append(self.waiting.popleft())
            self.running.sort(key=lambda r: r.id)
            return True
        while not self.pages.grow(request, tokens):
            younger = [r for r in self.running if r.id > request.id and not r.under_way]
            if not younger:
                return False  # wait: those under way come back, and the older ones finish
            self._preempt(younger[-1])
        return True

    def _preempt(self, request: Request) -> None:
        """Take back a request's pages; it keeps its tokens and will be prefilled again, prompt and output."""
        self.pages.release(request)
        self.running.remove(request)
        request.preemptions += 1
        request.preempted.append(time.perf_counter())
        position = sum(waiting.id < request.id for waiting in self.waiting)
        self.waiting.insert(position, request)


def _batch(decode: list[tuple[Request, Sequence]], prefill: list[tuple[Request, Sequence]]) -> Scheduled | None:
    if not decode and not prefill:
        return None
    batch = Batch([part for _, part in decode], [part for _, part in prefill])
    return Scheduled(batch, [request for request, _ in decode + prefill])


class Policy(Protocol):
    """Chooses the next batch for the lane of that name; without a name, leaves alone whatever is under way."""

    def __call__(self, scheduler: Scheduler, lane: str | None = None) -> Scheduled | None: ...


def prefill_only(scheduler: Scheduler, lane: str | None = None) -> Scheduled | None:
    """For a lane that only prefills: whole prompts."""
    return _batch([], scheduler.next_prefill(scheduler.limits.prefill_tokens, lane=lane))


def decode_only(scheduler: Scheduler, lane: str | None = None) -> Scheduled | None:
    """For a lane that only decodes: one token for each request that is ready."""
    return _batch(scheduler.next_decode(lane), [])


def prefill_first(scheduler: Scheduler, lane: str | None = None) -> Scheduled | None:
    """For one lane in turns: prefill whenever a prompt waits and fits, else decode."""
    return prefill_only(scheduler, lane) or decode_only(scheduler, lane)


def mixed(scheduler: Scheduler, lane: str | None = None) -> Scheduled | None:
    """For one lane with mixed batches: every decode token, then chunks of prompts up to the token budget.

    Chunked prefill as in Sarathi-Serve (Agrawal et al., arXiv 2403.02310). A quarter of the budget is the
    prompts' even where decode tokens use it up, or many requests decoding would keep others from starting.
    """
    decode, limits = scheduler.next_decode(lane), scheduler.limits
    taken = -(-len(decode) // limits.decode_step) * limits.decode_step
    budget = max(limits.chunk_tokens - taken, limits.chunk_tokens // 4, 1)
    return _batch(decode, scheduler.next_prefill(budget, True, lane))
