"""How long each of the two phases takes, read from the spans of the lanes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.errors import RequestError
from splitwiser_lab.timeline import Span


def time_phases(
    engine: Engine, prompt: str | Sequence[int], new_tokens: int = 16, *, batch: int = 1, repeats: int = 3
) -> list[dict[str, Any]]:
    """Prefill and decode of one prompt (`batch` copies of it at once), after a warm-up: one row for each phase.

    A row has `phase`, `tokens` (prompt tokens of a sequence; for decode the context in the middle of the run),
    `batch` (sequences), `ms` and `tokens_per_s`: medians over `repeats` of the time of the whole prefill, and over
    all of their decode steps with every sequence in it. Only time on the lanes counts. The engine's mode is used
    as it is. Raises RequestError for fewer than 2 new tokens, or a batch or number of repeats below 1.
    """
    tokens = engine.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
    runs = phase_spans(engine, tokens, new_tokens, batch, repeats)
    prefill_s = median(sum(span.seconds for span in prefills) for prefills, _ in runs)
    decode_s = median(span.seconds for _, steps in runs for span in steps)
    return [
        _row("prefill", len(tokens), batch, prefill_s, batch * len(tokens)),
        _row("decode", len(tokens) + new_tokens // 2, batch, decode_s, batch),
    ]


def phase_spans(
    engine: Engine, tokens: list[int], new_tokens: int, batch: int, repeats: int
) -> list[tuple[list[Span], list[Span]]]:
    """For each repeat, after a warm-up: the spans that hold prompt tokens, and the decode steps of the whole batch.

    Raises RequestError as `time_phases`.
    """
    if new_tokens < 2 or batch < 1 or repeats < 1:
        raise RequestError(
            f"new_tokens={new_tokens}, batch={batch}, repeats={repeats}: give at least 2 new tokens (prefill makes the "
            "first, decode the rest), 1 sequence and 1 repeat."
        )
    runs = []
    for number in range(repeats + 1):
        spans = engine.generate([tokens] * batch, new_tokens, ignore_eos=True).timeline.spans
        steps = [span for span in spans if span.phase == "decode" and span.sequences == batch]
        if not steps:
            raise RequestError(
                f"{batch} sequences never decoded together in {new_tokens} steps of mode {engine.mode!r}: ask for more "
                "new tokens, a smaller batch, or a larger max_batch."
            )
        if number:  # the first run warms up
            runs.append(([span for span in spans if span.prefill_tokens], steps))
    return runs


def _row(phase: str, tokens: int, batch: int, seconds: float, done: int) -> dict[str, Any]:
    per_s = done / seconds
    return {"phase": phase, "tokens": tokens, "batch": batch, "ms": seconds * 1e3, "tokens_per_s": per_s}
