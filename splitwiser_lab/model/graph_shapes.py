"""Which shapes CUDA graphs are made for: batches are padded to few of them, and those that are usual are made early."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from splitwiser_lab.model.paged import Shape

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
_ROWS_STEP = 128  # beyond those
MOST_TOKENS = 8192  # of prompts in a graph: with more, launching kernels one by one costs nothing to speak of
MIXED_ROWS = 32  # decoding rows beside prompts are padded to multiples of this
_MIXED_TOTALS = (128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)  # rows and tokens of mixed batches
_MIXED_STEP = 512  # beyond those
_LEAST_PROMPTS = 16  # to pick a token after fewer prompts costs the same


def padded(shape: Shape) -> Shape:
    """The shape of the graph for a batch of this one."""
    if shape.rows and shape.tokens:
        return _padded_mixed(shape)
    fitting = next((rows for rows in ROWS if rows >= shape.rows), -(-shape.rows // _ROWS_STEP) * _ROWS_STEP)
    return Shape(fitting if shape.rows else 0, _padded_tokens(shape.tokens), _padded_prompts(shape.prompts))


@dataclass(frozen=True)
class UsualWork:
    """What a lane will be given: up to so many decoding rows, prompt tokens, or tokens in a mixed batch; 0 for none."""

    rows: int = 0
    prefill_tokens: int = 0
    mixed_tokens: int = 0

    def shapes(self) -> list[Shape]:
        """Those that its batches are most likely to have, once each.

        The largest first: what it took fits all others afterwards, while each larger one would need memory of its own.
        """
        found = dict.fromkeys((*self._decode(), *self._prefill(), *self._mixed()))
        return sorted(found, key=lambda shape: shape.rows + shape.tokens, reverse=True)

    def _decode(self) -> Iterator[Shape]:
        return (padded(Shape(rows)) for rows in ROWS if rows <= padded(Shape(self.rows)).rows)

    def _prefill(self) -> Iterator[Shape]:
        tokens, most = 0, min(self.prefill_tokens, MOST_TOKENS)
        while tokens < most:
            shape = padded(Shape(0, tokens + 1, 1))
            tokens = shape.tokens
            yield shape

    def _mixed(self) -> Iterator[Shape]:
        """Full budgets and what is left over of prompts, beside any number of decoding rows."""
        totals = [total for total in _MIXED_TOTALS if total < self.mixed_tokens <= MOST_TOKENS]
        if 0 < self.mixed_tokens <= MOST_TOKENS:
            totals.append(self.mixed_tokens)
        for rows in range(MIXED_ROWS, min(self.rows, ROWS[-1]) + MIXED_ROWS, MIXED_ROWS):
            yield from (padded(Shape(rows, total - rows, 1)) for total in totals if total > rows)


def _padded_mixed(shape: Shape) -> Shape:
    """Few sizes for rows and tokens together, since it is their sum that the matrix products see."""
    rows = -(-shape.rows // MIXED_ROWS) * MIXED_ROWS
    least = rows + shape.tokens
    total = next((size for size in _MIXED_TOTALS if size >= least), -(-least // _MIXED_STEP) * _MIXED_STEP)
    return Shape(rows, total - rows, _padded_prompts(shape.prompts))


def _padded_tokens(tokens: int) -> int:
    """Up to the next step: a step is no more than what a matrix product pads to in any case."""
    step = 64 if tokens <= 512 else 128 if tokens <= 2048 else 256
    return -(-tokens // step) * step


def _padded_prompts(count: int) -> int:
    """Up to a power of two."""
    return max(_LEAST_PROMPTS, 1 << (count - 1).bit_length()) if count else 0
