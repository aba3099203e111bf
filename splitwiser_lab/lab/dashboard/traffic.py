"""Requests that keep coming: an endless open loop whose rate and lengths can be changed on the way.

It knows no engine and no clock: whoever runs it says what time it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

from splitwiser_lab.measure.workload import Workload

_PROMPTS = 3  # different prompts of each length: the reference is asked about every one


@dataclass(frozen=True)
class Task:
    """One request to come: token ids, and how many new ones."""

    prompt: tuple[int, ...]
    new_tokens: int
    ignore_eos: bool = True


class Traffic:
    """Tasks in turn, at exponential gaps or at those of a workload, at so many per second."""

    def __init__(self, tasks: Sequence[Task], gaps: Iterator[float], rate: float, now: float) -> None:
        """`gaps` have a mean of 1; the first task comes at once."""
        self.tasks, self._turn, self._gaps = list(tasks), cycle(tasks), gaps
        self._rate, self._next = rate, now

    @property
    def next(self) -> float:
        """When the next task comes."""
        return self._next

    @property
    def rate(self) -> float:
        """Tasks per second."""
        return self._rate

    def set_rate(self, rate: float, now: float) -> None:
        """Change the rate: what is left of the present gap is stretched or shortened with it."""
        self._next = now + max(0.0, self._next - now) * self._rate / rate
        self._rate = rate

    def resume(self, now: float) -> None:
        """Go on after a pause, without the tasks that would have come meanwhile."""
        self._next = max(self._next, now)

    def due(self, now: float) -> Iterator[tuple[float, Task]]:
        """The tasks that have come by `now`, each with its moment of arrival."""
        while self._next <= now:
            arrival, self._next = self._next, self._next + next(self._gaps) / self._rate
            yield arrival, next(self._turn)


def poisson_gaps(seed: int = 0) -> Iterator[float]:
    """Exponential gaps with a mean of 1."""
    draw = random.Random(seed)
    while True:
        yield draw.expovariate(1.0)


def workload_gaps(workload: Workload) -> Iterator[float]:
    """The workload's own gaps over and over, scaled to a mean of 1; exponential ones where all arrive at once."""
    times = [arrival.arrival_s for arrival in workload.arrivals]
    if times[-1] == times[0]:
        return poisson_gaps(workload.seed)
    mean = (times[-1] - times[0]) / (len(times) - 1)
    return cycle([*((b - a) / mean for a, b in pairwise(times)), 1.0])


def tasks_of(workload: Workload, engine: Any) -> list[Task]:
    """A workload's requests as tasks for this engine."""
    asked = workload.requests(vocab_size=engine.config.vocab_size, max_tokens=engine.longest_request)
    ids = [engine.tokenize(item.prompt) if isinstance(item.prompt, str) else item.prompt for item in asked]
    return [Task(tuple(p), item.max_new_tokens, item.ignore_eos) for p, item in zip(ids, asked, strict=True)]


def tasks_of_length(texts: Sequence[Sequence[int]], prompt_tokens: int, new_tokens: int) -> list[Task]:
    """Prompts of exactly `prompt_tokens` tokens, cut from the first of `texts` (repeated where they are shorter)."""
    prompts = [tuple(list(text) * (1 + prompt_tokens // len(text)))[:prompt_tokens] for text in texts[:_PROMPTS]]
    return [Task(prompt, new_tokens) for prompt in prompts]


def base_texts(engine: Any) -> list[list[int]]:
    """Token ids to cut prompts from: the project's own texts, or random ids where the model has no tokenizer."""
    from splitwiser_lab.measure.prompts import load_prompts

    if engine.tokenizer is None:
        draw, low = random.Random(0), min(10, engine.config.vocab_size // 2)
        return [[draw.randrange(low, engine.config.vocab_size) for _ in range(4096)] for _ in range(_PROMPTS)]
    texts = load_prompts("summarisation")
    return [engine.tokenize(" ".join(texts[first::_PROMPTS])) for first in range(_PROMPTS)]
