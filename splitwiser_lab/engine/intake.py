"""The door: prompts become requests here, or are refused with the reason; and tokens are watched for an end."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from splitwiser_lab.engine.request import Request, Sampling
from splitwiser_lab.engine.result import decode
from splitwiser_lab.errors import RequestError
from splitwiser_lab.timeline import FinishReason

Prompt = str | Sequence[int]

_STOP_WINDOW = 8  # tokens decoded beyond the length of a stop text, to find one that starts inside a token


class Model(Protocol):
    """What the door must know of a model."""

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""
        ...

    @property
    def context(self) -> int:
        """The most tokens of a request, prompt and output."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a request."""
        ...


class Intake:
    """Knows what the model and the pool can hold, and turns prompts into requests with ids of their own."""

    def __init__(self, config: Model, tokenizer: Any, pool_tokens: int) -> None:
        self._config, self._tokenizer, self._pool_tokens = config, tokenizer, pool_tokens
        self._ids = itertools.count()

    @property
    def longest(self) -> int:
        """The most tokens, prompt and output, that one request can have."""
        return min(self._config.context, self._pool_tokens)

    def tokenize(self, prompt: str, chat: bool = False) -> list[int]:
        """Token ids of a text; with `chat`, as one user turn in the model's chat template."""
        if self._tokenizer is None:
            raise RequestError("this engine has no tokenizer: pass token ids, or load the model by name or folder.")
        if not chat:
            return list(self._tokenizer(prompt).input_ids)
        turn = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def request(
        self,
        prompt: Prompt,
        arrival: float | None,
        on_token: Callable[[Request, int], None] | None,
        sampling: dict[str, Any],
    ) -> Request:
        """Check a prompt and its parameters, and make a request of them. Raises RequestError."""
        parameters = dict(sampling)
        eos = frozenset() if parameters.pop("ignore_eos", False) else frozenset(self._config.eos_token_ids)
        stop = parameters.pop("stop", ())
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        if texts and self._tokenizer is None:
            raise RequestError("stop texts need a tokenizer: load the model by name or folder.")
        wanted = Sampling(stop_token_ids=eos, stop=texts, **parameters)
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        self._check(tokens, wanted)
        return Request(next(self._ids), tokens, wanted, time.perf_counter() if arrival is None else arrival, on_token)

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        arrival: float,
        on_token: Callable[[Request, int], None] | None,
        sampling: dict[str, Any],
        seed: int,
    ) -> list[Request]:
        """Requests of one prompt or many, all or none; the one at place i gets `seed` + i. Raises RequestError."""
        if not hasattr(prompts, "__len__"):
            raise RequestError(f"prompts are a text, a list of token ids, or a list of either, not {prompts!r:.80}.")
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many = cast(list[Prompt], [prompts] if one else list(prompts))
        if not many:
            raise RequestError("no prompts given: pass a text, a list of token ids, or a list of either.")
        made = []
        for number, prompt in enumerate(many):
            try:
                made.append(self.request(prompt, arrival, on_token, {**sampling, "seed": seed + number}))
            except RequestError as error:
                raise RequestError(f"prompt {number}: {error}" if len(many) > 1 else str(error)) from None
        return made

    def refused(self, arrival: float, error: RequestError) -> Request:
        """The record of a request that was not let in."""
        request = Request(next(self._ids), [], Sampling(), arrival)
        request.finish("refused", time.perf_counter(), error)
        return request

    def ends(self, request: Request) -> FinishReason | None:
        """Whether the newest token of `request` ends it, and why."""
        wanted, output = request.sampling, request.output
        if output[-1] in wanted.stop_token_ids:
            return "stop"
        if wanted.stop:
            longest = max(len(text.encode()) for text in wanted.stop)  # a token is at least a byte
            recent = decode(self._tokenizer, output[-longest - _STOP_WINDOW :])
            if any(text in recent for text in wanted.stop):
                return "stop"
        return "length" if len(output) >= wanted.max_new_tokens else None

    def _check(self, tokens: list[int], wanted: Sampling) -> None:
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token.")
        for token in tokens:
            if not 0 <= token < self._config.vocab_size:
                raise RequestError(f"token id {token} is outside the vocabulary of {self._config.vocab_size} ids.")
        total = len(tokens) + wanted.max_new_tokens
        for limit, what, way_out in (
            (self._config.context, "the model's context", "shorten the prompt or ask for fewer new tokens"),
            (self._pool_tokens, "the KV pool", "do that, or load the model with more kv_tokens"),
        ):
            if total > limit:
                raise RequestError(
                    f"{len(tokens)} prompt tokens and {wanted.max_new_tokens} new ones make {total}, more than "
                    f"{what} holds ({limit}): {way_out}."
                )


def _token_ids(prompt: Sequence[int]) -> list[int]:
    """Plain numbers, also from NumPy's and PyTorch's. Raises RequestError."""
    try:
        return [int(operator.index(token)) for token in prompt]
    except TypeError:
        raise RequestError(f"a prompt is a text or a list of token ids, not {str(prompt)[:80]!r}.") from None
