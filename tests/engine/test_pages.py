"""Pages: none belongs to two requests, all come back, and a hand-off moves nothing but the block table."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import expected, prompts_of

from splitwiser_lab import Engine
from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request, Sampling


def request_of(number: int) -> Request:
    return Request(number, [1], Sampling(), 0.0)


def check(pages: PageAllocator, owners: list[Request]) -> None:
    owned = [page for request in owners for page in request.pages]
    assert len(owned) == len(set(owned)), "a page belongs to two requests"
    assert sorted(owned + pages._free) == list(range(pages.pages)), "pages were lost or invented"


def test_random_growth_and_release() -> None:
    numbers, pages = random.Random(0), PageAllocator(23, 4)
    requests = [request_of(i) for i in range(6)]
    refused = 0
    for _ in range(2000):
        request = numbers.choice(requests)
        if numbers.random() < 0.3:
            pages.release(request)
        else:
            before, free, tokens = list(request.pages), pages.free, numbers.randrange(1, 60)
            need = pages.needed(request, tokens)
            grown = pages.grow(request, tokens)
            assert grown == (need <= free)
            assert request.pages[: len(before)] == before, "pages already owned stay where they are"
            assert len(request.pages) == len(before) + (need if grown else 0)
            assert not grown or len(request.pages) * 4 >= tokens
            refused += not grown
        check(pages, requests)
    assert refused > 20
    for request in requests:
        pages.release(request)
    assert pages.free == 23


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_needed(tokens: int, pages: int) -> None:
    assert PageAllocator(10, 4).needed(request_of(0), tokens) == pages


def test_release_forgets_what_was_computed() -> None:
    pages, request = PageAllocator(4, 4), request_of(0)
    pages.grow(request, 10)
    request.computed = 10
    pages.release(request)
    assert (request.pages, request.computed, pages.free) == ([], 0, 4)


@pytest.fixture
def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Checks the books of the engine's allocator at every change; gives the highest use seen."""
    scheduler, most = engine._core.scheduler, [0]
    pages = scheduler.pages

    def watch(name: str) -> None:
        original = getattr(pages, name)

        def wrapped(request: Request, *rest: Any) -> Any:
            outcome = original(request, *rest)
            check(pages, list({id(r): r for r in [*scheduler.running, request]}.values()))
            most[0] = max(most[0], pages.pages - pages.free)
            return outcome

        monkeypatch.setattr(pages, name, wrapped)

    watch("grow")
    watch("release")
    yield most
    assert pages.free == pages.pages


@pytest.mark.parametrize("mode", ["sequential", "chunked", "processes"])
def test_books_are_right_at_every_step_of_a_run(engine: Engine, watched: list[int], mode: str) -> None:
    engine.set_mode(mode, max_batch=5, prefill_tokens=64)
    prompts = prompts_of(*range(3, 75, 6))
    assert engine.generate(prompts, 20).tokens == expected("llama", prompts, 20)
    assert watched[0] > 10


@pytest.mark.parametrize("mode", ["sequential", "chunked", "processes"])
def test_hand_off_moves_no_bytes(engine: Engine, mode: str) -> None:
    """After the last prefill batch and after the first decode batch: same pages, and in them the same bytes."""
    engine.set_mode(mode)
    (prompt,) = prompts_of(45)
    seen: list[tuple[list[int], torch.Tensor, str]] = []

    def look(request: Request, token: int) -> None:
        if len(seen) < 2:
            content = engine.pool.data[:, :, request.pages].flatten(2, 3)[:, :, : len(prompt)]
            seen.append((list(request.pages), content.clone(), request.phase))

    engine.generate(prompt, 3, on_token=look)
    (pages, content, phase), (pages_later, content_later, _) = seen
    assert phase == "decode", "the hand-off has happened when the first token is there"
    assert pages_later == pages
    assert torch.equal(content_later, content)
    assert content.abs().sum(-1).min() > 0, "all of the prompt is in the pool"


def test_hand_off_is_timed(engine: Engine) -> None:
    engine.set_mode("processes")
    prompts = prompts_of(20, 30, 40)
    for record in engine.generate(prompts, 4).timeline.requests:
        assert record.hand_off == record.token_times[0]
