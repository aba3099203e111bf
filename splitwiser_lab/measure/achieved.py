"""What the engine did with the hardware, derived from its spans: FLOP/s in prefill, bytes/s in decode.

This needs no counter of the hardware, so it works where NVML and the operating system tell nothing. It counts
the least work of each batch (see `predict.work`), so a share of a ceiling is what was useful, not what was busy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.predict.ceilings import Ceilings
from splitwiser_lab.predict.work import Work, count
from splitwiser_lab.timeline import Span


@dataclass(frozen=True, slots=True)
class Achieved:
    """Rates over a stretch of time; a share is that of the ceiling, None where none was given."""

    prefill_flops_per_s: float
    decode_bytes_per_s: float
    prefill_share: float | None = None
    decode_share: float | None = None


def span_work(span: Span, config: ModelConfig, itemsize: int) -> Work | None:
    """The least work of a span's batch; None for a span recorded without its costs."""
    if span.context_tokens is None or span.attended_pairs is None or span.picked is None:
        return None
    tokens = span.prefill_tokens + span.decode_tokens
    return count(config, itemsize, tokens, span.picked, span.context_tokens, span.attended_pairs)


def achieved(
    spans: Iterable[Span],
    config: ModelConfig,
    itemsize: int,
    start: float,
    end: float,
    ceilings: Ceilings | None = None,
) -> Achieved | None:
    """FLOP/s of the batches with prompt tokens and bytes/s of those that decode, between `start` and `end` (seconds).

    A span that the window cuts counts pro rata. A mixed batch does both at once and counts in both. None when a
    span in the window was recorded without its costs. Raises ValueError for an empty window.
    """
    if not end > start:
        raise ValueError(f"a rate needs a window of positive length, got {start} to {end} s")
    flops = nbytes = 0.0
    for span in spans:
        inside = max(0.0, min(end, span.end) - max(start, span.start))
        if not inside:
            continue
        work = span_work(span, config, itemsize)
        if work is None:
            return None
        part = inside / span.seconds
        flops += part * work.flops * bool(span.prefill_tokens)
        nbytes += part * work.bytes * bool(span.decode_tokens)
    rates = flops / (end - start), nbytes / (end - start)
    if ceilings is None:
        return Achieved(*rates)
    return Achieved(*rates, rates[0] / ceilings.flops_per_s, rates[1] / ceilings.bytes_per_s)
