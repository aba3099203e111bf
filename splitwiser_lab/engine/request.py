"""A request: one prompt, its sampling parameters, its tokens and its timestamps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from splitwiser_lab.errors import RequestError
from splitwiser_lab.model.batch import GREEDY, PENDING, SamplingSpec, Sequence
from splitwiser_lab.timeline import FinishReason, Phase, RequestRecord


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are picked and when it ends.

    `temperature` 0 is greedy. `stop` are texts, `stop_token_ids` ids that end the request; the model's
    end-of-sequence ids are among the latter unless they are ignored.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises RequestError for parameters that make no sense."""
        for name in ("temperature", "top_p", "seed"):
            if not isinstance(getattr(self, name), Real):
                raise RequestError(f"{name}={getattr(self, name)!r}: give a number.")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={self.max_new_tokens!r}: ask for at least 1 new token.")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature={self.temperature!r}: use 0 for greedy, or a positive number such as 0.8.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p!r}: it is a share of probability, above 0 and at most 1.")
        if any(not text for text in self.stop):
            raise RequestError("stop holds an empty text, which would end every request at once: leave it out.")

    def spec(self, index: int) -> SamplingSpec:
        """What a lane needs to pick the output token number `index`: it depends on the seed and on nothing else."""
        if self.temperature == 0:
            return GREEDY
        number = np.random.Generator(np.random.Philox(key=self.seed % 2**64, counter=index)).random()
        return SamplingSpec(self.temperature, self.top_p, float(number))


@dataclass(eq=False)
class Request:
    """A prompt on its way through the engine. `pages` is its block table, `computed` the tokens in the pool.

    While parts of it are in batches `under_way` on `lane`, it can be scheduled there again before their
    tokens were read: `length`, `phase` and `next_tokens` take them as done.
    """

    id: int
    prompt: list[int]
    sampling: Sampling
    arrival: float
    on_token: Callable[[Request, int], None] | None = None
    output: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    under_way: deque[Sequence] = field(default_factory=deque)
    lane: str | None = None
    cancel_requested: bool = False
    token_times: list[float] = field(default_factory=list)
    scheduled: float | None = None
    hand_off: float | None = None
    finished: float | None = None
    finish_reason: FinishReason = "unfinished"
    preemptions: int = 0
    preempted: list[float] = field(default_factory=list)  # when it gave its pages back, where that is known
    error: Exception | None = None

    @property
    def unread(self) -> int:
        """Tokens that batches under way pick for it."""
        count = 0
        for part in self.under_way:  # a loop: this is asked for every request at every step
            if part.sampling is not None:
                count += 1
        return count

    @property
    def reached(self) -> int:
        """Tokens in the pool once the batches under way are done."""
        return self.under_way[-1].context if self.under_way else self.computed

    @property
    def length(self) -> int:
        """Tokens known so far or under way, prompt and output."""
        return len(self.prompt) + len(self.output) + self.unread

    @property
    def wants_more(self) -> bool:
        """Whether another token may be asked for. Other ends than its length are seen when tokens are read."""
        return len(self.output) + self.unread < self.sampling.max_new_tokens

    @property
    def phase(self) -> Phase:
        """Decode once all tokens but the newest are in the pool. A preempted request prefills again."""
        length = self.length
        return "decode" if length > len(self.prompt) and self.reached == length - 1 else "prefill"

    @property
    def done(self) -> bool:
        """Whether it has ended, however."""
        return self.finish_reason != "unfinished"

    def next_tokens(self, count: int) -> Sequence:
        """The next `count` tokens as part of a batch; the last known token asks for its successor."""
        start, unread = self.reached, self.unread
        picked = len(self.output) + unread
        length, end = len(self.prompt) + picked, start + count
        if picked and start == length - 1:
            tokens = [PENDING] if unread else self.output[-1:]
        else:
            tokens = (self.prompt + self.output)[start:end]
        spec = self.sampling.spec(picked) if end == length else None
        return Sequence(tokens, start, list(self.pages), spec)

    def finish(self, reason: FinishReason, now: float, error: Exception | None = None) -> None:
        """Mark it as ended."""
        self.finish_reason, self.finished, self.error = reason, now, error

    def record(self, origin: float) -> RequestRecord:
        """This request's timestamps, in seconds since `origin`."""

        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - origin

        return RequestRecord(
            id=self.id,
            prompt_tokens=len(self.prompt),
            arrival=self.arrival - origin,
            token_times=tuple(moment - origin for moment in self.token_times),
            scheduled=since(self.scheduled),
            hand_off=since(self.hand_off),
            finished=since(self.finished),
            finish_reason=self.finish_reason,
            preemptions=self.preemptions,
            error=None if self.error is None else str(self.error),
            preempted=tuple(moment - origin for moment in self.preempted),
        )
