"""For whoever plays the engine by hand: look at a request's rows in the pool, weigh messages, draw what lanes did."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from multiprocessing.reduction import ForkingPickler

import torch

from splitwiser_lab.hardware import cores
from splitwiser_lab.model.batch import GREEDY, Batch, BatchResult, Sequence
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.timeline import Phase, Span, Timeline


def cached(pool: KVPool, block_table: SequenceOf[int], tokens: int) -> torch.Tensor:
    """A copy of the keys and values of a request's first `tokens` tokens, `[layers, 2, tokens, kv_heads, head_dim]`."""
    pages = pool.data[:, :, list(block_table)]  # [layers, 2, pages, page_size, kv_heads, head_dim]
    return pages.flatten(2, 3)[:, :, :tokens]


def fingerprint(pool: KVPool, block_table: SequenceOf[int], tokens: int) -> str:
    """A short checksum (of SHA-256) over every byte of those keys and values: one bit changed, another checksum."""
    rows = cached(pool, block_table, tokens).contiguous().view(torch.uint8)
    return hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()[:12]


def message_bytes(token: int, position: int, block_table: SequenceOf[int]) -> int:
    """How many bytes a process lane sends to its worker for `decode_one_token` with these arguments."""
    batch = Batch([Sequence([token], position, list(block_table), GREEDY)], [])
    return len(ForkingPickler.dumps((cores(), batch)))


class Recording:
    """Collects what lanes did into a timeline that starts with the first batch."""

    def __init__(self) -> None:
        self._spans: list[tuple[Phase, BatchResult, int]] = []

    def add(self, phase: Phase, result: BatchResult, tokens: int = 1) -> int:
        """Note one batch of one sequence that computed `tokens` tokens, and return the token it picked.

        Each phase is a row of its own, named like the phase.
        """
        self._spans.append((phase, result, tokens))
        picked = result.tokens[0]
        assert picked is not None, "this batch was not asked for a token"
        return picked

    @property
    def timeline(self) -> Timeline:
        """Everything noted so far."""
        origin = min((result.start for _, result, _ in self._spans), default=0.0)
        spans = [
            Span(phase, phase, result.start - origin, result.end - origin, *_counts(phase, tokens), 1, "by hand")
            for phase, result, tokens in self._spans
        ]
        return Timeline(tuple(sorted(spans, key=lambda span: span.end)), ())


def _counts(phase: Phase, tokens: int) -> tuple[int, int]:
    return (tokens, 0) if phase == "prefill" else (0, tokens)
