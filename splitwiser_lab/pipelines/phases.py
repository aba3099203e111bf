"""The two phases of a batch on an untouched transformers model: eager, greedy, as `generate` runs them.

Prompts of different lengths are padded on the left; those of one length are not padded, and the model
gets no mask. Both phases are the same functions in every mode: a mode only decides in which process
they run.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splitwiser_lab.pipelines.kv import new_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that go through the model together. Row i gets `new_tokens[i]` tokens, or ends at one of `stops[i]`."""

    number: int
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    stops: tuple[frozenset[int], ...]
    due: float = 0.0  # seconds after the start: when the last of its requests arrives

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, to which the others are padded."""
        return max(map(len, self.prompts))

    @property
    def padding(self) -> int:
        """Positions that are computed and mean nothing."""
        return sum(self.longest - len(prompt) for prompt in self.prompts)


@dataclass(frozen=True)
class Step:
    """One pass of a batch: host times in seconds, and each row's token (None: the row has ended)."""

    start: float
    end: float
    tokens: list[int | None]


class Rows:
    """Which rows of a batch still want tokens."""

    def __init__(self, batch: PromptBatch) -> None:
        self._stops, self._left = batch.stops, list(batch.new_tokens)

    @property
    def over(self) -> bool:
        """Whether every row has ended."""
        return not any(self._left)

    def take(self, tokens: list[int]) -> list[int | None]:
        """One new token for each row; None for those that had ended."""
        taken: list[int | None] = []
        for row, token in enumerate(tokens):
            taken.append(token if self._left[row] else None)
            if self._left[row]:
                self._left[row] = 0 if token in self._stops[row] else self._left[row] - 1
        return taken


class Phases:
    """Runs both phases on one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        known = inspect.signature(model.forward).parameters
        self._positions, self._last_only = "position_ids" in known, "logits_to_keep" in known

    def prefill(self, batch: PromptBatch) -> tuple[torch.Tensor, Any]:
        """The first new token of each row, [B], and the cache with the keys and values of the prompts."""
        longest, device = batch.longest, self.model.device
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in batch.prompts]
        cache = new_cache(self.model.config)
        mask = self._mask(batch, 0)
        positions = torch.arange(longest, device=device).expand(len(rows), longest) - self._pads(batch)
        return self._forward(torch.tensor(rows, device=device), mask, positions.clamp(min=0), cache), cache

    def decode(self, batch: PromptBatch, cache: Any, first: list[int]) -> Iterator[Step]:
        """All further tokens, step by step; `first` are those that prefill picked. Changes `cache`."""
        rows = Rows(batch)
        rows.take(first)
        tokens = torch.tensor(first, device=self.model.device)
        mask = self._mask(batch, max(batch.new_tokens))
        positions = batch.longest - self._pads(batch)  # [B, 1]
        taken = 0
        while not rows.over:
            taken += 1
            start = time.perf_counter()
            seen = None if mask is None else mask[:, : batch.longest + taken]
            tokens = self._forward(tokens[:, None], seen, positions, cache)
            picked = tokens.tolist()  # waits for the device
            positions = positions + 1
            yield Step(start, time.perf_counter(), rows.take(picked))

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Tokens [B, T] in, the likeliest next token of each row [B] out."""
        options: dict[str, Any] = {"position_ids": positions} if self._positions else {}
        if self._last_only:
            options["logits_to_keep"] = 1  # else a prompt's logits would take gigabytes
        with torch.inference_mode():
            out = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
            return out.logits[:, -1].argmax(-1)  # type: ignore[no-any-return]

    def _pads(self, batch: PromptBatch) -> torch.Tensor:
        pads = [[batch.longest - len(prompt)] for prompt in batch.prompts]
        return torch.tensor(pads, device=self.model.device)  # [B, 1]

    def _mask(self, batch: PromptBatch, new_tokens: int) -> torch.Tensor | None:
        """1 where there is a token, [B, longest + new_tokens]; None where nothing is padded."""
        if not batch.padding:
            return None
        places = torch.arange(batch.longest + new_tokens, device=self.model.device)
        return (places >= self._pads(batch)).long()
