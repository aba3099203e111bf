"""What a call to the engine gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import RequestError
from splitwiser_lab.metrics import Metrics
from splitwiser_lab.timeline import ModeChange, Span, Timeline


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
    requests: Sequence[Request], spans: Sequence[Span], modes: Sequence[ModeChange], origin: float
) -> Timeline:
    """Requests, and what lanes did meanwhile, on a clock that starts at `origin`."""
    moved = (
        Span(s.lane, s.phase, s.start - origin, s.end - origin, s.prefill_tokens, s.decode_tokens, s.sequences, s.mode)
        for s in spans
        if s.end >= origin
    )
    changes = [ModeChange(max(0.0, m.time - origin), m.mode, m.options) for m in modes]
    before = [change for change in changes if change.time == 0.0][-1:]
    records = tuple(request.record(origin) for request in requests)
    return Timeline(tuple(moved), records, (*before, *(change for change in changes if change.time > 0.0)))
