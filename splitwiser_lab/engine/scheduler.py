"""Which requests run next, with which tokens.

The scheduler answers two questions, the next prefill batch and the next decode batch; a policy puts
them together for one lane. It does not know what a lane is, nor how many there are: a request whose
batch is under way is marked `in_flight` and left alone until the result is folded back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request
from splitwiser_lab.model.batch import Batch
from splitwiser_lab.timeline import Phase


@dataclass(frozen=True)
class Limits:
    """At most so many requests at once, and so many tokens in a prefill batch (a longer prompt goes alone)."""

    max_requests: int
    prefill_tokens: int
    chunk_tokens: int


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

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request and take its pages. It must not be in flight."""
        self.pages.release(request)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def next_prefill(self, token_budget: int, chunked: bool = False) -> list[tuple[Request, int]]:
        """Requests and how many of their tokens to prefill: those begun first, then those waiting.

        With `chunked`, no more than `token_budget` tokens, splitting prompts; else whole prompts, at least one.
        """
        chosen: list[tuple[Request, int]] = []
        for request in self._prefill_candidates():
            count = request.length - request.computed
            if chunked:
                count = min(count, token_budget)
            if count == 0 or (chosen and count > token_budget):
                break
            if not self._make_room(request, request.computed + count):
                break
            chosen.append(self._take(request, count))
            token_budget -= count
        return chosen

    def next_decode(self) -> list[tuple[Request, int]]:
        """All requests that can decode now, one token each."""
        chosen: list[tuple[Request, int]] = []
        for request in list(self.running):
            if self._ready(request, "decode") and self._make_room(request, request.length):
                chosen.append(self._take(request, 1))
        return chosen

    def _ready(self, request: Request, phase: Phase) -> bool:
        preempted = not request.pages  # a moment ago, to make room for an older one
        return request.phase == phase and not request.in_flight and not preempted

    def _take(self, request: Request, count: int) -> tuple[Request, int]:
        request.in_flight = True  # from here on it cannot be preempted, nor scheduled elsewhere
        return request, count

    def _prefill_candidates(self) -> Iterator[Request]:
        for request in list(self.running):
            if self._ready(request, "prefill"):
                yield request
        while self.waiting and len(self.running) < self.limits.max_requests:
            yield self.waiting[0]

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Get the pages for `tokens` tokens. Who waits takes only what is free; who runs may preempt younger ones."""
        if request not in self.running:
            # Leave a page for each running request, or the newcomer would be preempted at their next page.
            if self.running and self.pages.needed(request, tokens) + len(self.running) > self.pages.free:
                return False
            if not self.pages.grow(request, tokens):
                return False
            self.running.append(self.waiting.popleft())
            self.running.sort(key=lambda r: r.id)
            return True
        while not self.pages.grow(request, tokens):
            younger = [r for r in self.running if r.id > request.id and not r.in_flight]
            if not younger:
                return False  # wait: those in flight come back, and the older ones finish
            self._preempt(younger[-1])
        return True

    def _preempt(self, request: Request) -> None:
        """Take back a request's pages; it keeps its tokens and will be prefilled again, prompt and output."""
        self.pages.release(request)
        self.running.remove(request)
        request.preemptions += 1
        position = sum(waiting.id < request.id for waiting in self.waiting)
        self.waiting.insert(position, request)


def _batch(decode: list[tuple[Request, int]], prefill: list[tuple[Request, int]]) -> Scheduled | None:
    if not decode and not prefill:
        return None
    batch = Batch([r.next_tokens(n) for r, n in decode], [r.next_tokens(n) for r, n in prefill])
    return Scheduled(batch, [request for request, _ in decode + prefill])


Policy = Callable[[Scheduler], Scheduled | None]


def prefill_only(scheduler: Scheduler) -> Scheduled | None:
    """For a lane that only prefills: whole prompts."""
    return _batch([], scheduler.next_prefill(scheduler.limits.prefill_tokens))


def decode_only(scheduler: Scheduler) -> Scheduled | None:
    """For a lane that only decodes: one token for each request that is ready."""
    return _batch(scheduler.next_decode(), [])


def prefill_first(scheduler: Scheduler) -> Scheduled | None:
    """For one lane in turns: prefill whenever a prompt waits and fits, else decode."""
    return prefill_only(scheduler) or decode_only(scheduler)


def mixed(scheduler: Scheduler) -> Scheduled | None:
    """For one lane with mixed batches: every decode token, then chunks of prompts up to the token budget.

    Chunked prefill as in Sarathi-Serve (Agrawal et al., arXiv 2403.02310). A quarter of the budget is the
    prompts' even where decode tokens use it up, or many requests decoding would keep others from starting.
    """
    decode, budget = scheduler.next_decode(), scheduler.limits.chunk_tokens
    budget = max(budget - len(decode), budget // 4, 1)
    return _batch(decode, scheduler.next_prefill(budget, chunked=True))
