"""What a call to the engine gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import RequestError
from splitwiser_lab.metrics import Metrics
from splitwiser_lab.timeline import ModeChange, Span, Timeline

# Two lanes' batches are folded in the order in which they are noticed, which is not quite that of their ends.
_FOLDED_LATE_SECONDS = 60.0


@dataclass(frozen=True)
class Result:
    """Tokens, texts, metrics and timeline of the requests of one call, in the order of the prompts."""

    requests: Sequence[Request]
    timeline: Timeline
    tokenizer: Any = None

    @property
    def tokens(self) -> list[list[int]]:
        """The new tokens of each request, an end-of-sequence token included."""
        return [list(request.output) for request in self.requests]

    @cached_property
    def texts(self) -> list[str]:
        """The new text of each request, cut before a stop text. Raises RequestError without a tokenizer."""
        if self.tokenizer is None:
            raise RequestError("this engine has no tokenizer: use result.tokens, or load the model by name or folder.")
        return [cut_at_stop(decode(self.tokenizer, r.output), r.sampling.stop) for r in self.requests]

    @cached_property
    def metrics(self) -> Metrics:
        """Latencies, throughputs and goodput of these requests."""
        return Metrics.of(self.timeline)

    @property
    def errors(self) -> list[Exception]:
        """What went wrong, request by request; empty when nothing did."""
        return [request.error for request in self.requests if request.error is not None]


def decode(tokenizer: Any, tokens: list[int]) -> str:
    """The text of `tokens`, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """`text` up to the first of the stop texts that occurs in it."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def settled(text: str, stop: tuple[str, ...]) -> str:
    """`text` without an end that more tokens may change: half a character, or the beginning of a stop text."""
    whole = text.rstrip("\ufffd")
    begun = (n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n]))
    return whole[: len(whole) - max(begun, default=0)]


def timeline_of(
    requests: Sequence[Request],
    spans: Sequence[Span],
    modes: Sequence[ModeChange],
    since: float,
    origin: float | None = None,
) -> Timeline:
    """Requests, and what lanes did from `since` on, on a clock that starts at `origin` (None: at `since`).

    The first of its modes is the one that held at `since`. `spans` are in order of their end, as the engine has
    them; of a long run only the last part is looked at.
    """
    zero = since if origin is None else origin
    recent = takewhile(lambda span: span.end >= since - _FOLDED_LATE_SECONDS, reversed(spans))
    moved = [replace(s, start=s.start - zero, end=s.end - zero) for s in recent if s.end >= since]
    before = [change for change in modes if change.time <= since][-1:]
    changes = [*(replace(change, time=since) for change in before), *(c for c in modes if c.time > since)]
    moved_changes = tuple(replace(change, time=change.time - zero) for change in changes)
    return Timeline(tuple(reversed(moved)), tuple(request.record(zero) for request in requests), moved_changes)
