"""Which engine gets which request, and when. A mode is a policy here; vLLM's own schedulers do the rest."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import LaneError
from splitwiser_lab.pipelines.vllm.placement import VllmPlacement
from splitwiser_lab.pipelines.vllm.team import Team

Step = dict[str, Any]  # what an engine says of one step: see engine_side/run_engine.py
Orders = dict[str, list[dict[str, Any]]]  # requests for each engine
Listener = Callable[[str, Step], None]


class Policy(Protocol):
    """Knows where each request is."""

    def arrive(self, index: int) -> None:
        """Request number `index` may begin."""
        ...

    def orders(self) -> Orders:
        """What each engine gets now."""
        ...

    def take(self, engine: str, step: Step) -> list[int]:
        """Hear of a step; the numbers of the requests that it ended."""
        ...


class Shares:
    """Each engine takes every N-th request through both phases."""

    def __init__(self, engines: Sequence[str], requests: Sequence[Request]) -> None:
        self._engines, self._requests = list(engines), requests
        self._next: Orders = defaultdict(list)

    def arrive(self, index: int) -> None:
        request = self._requests[index]
        engine = self._engines[index % len(self._engines)]
        self._next[engine].append(_order(index, request, request.prompt, request.sampling.max_new_tokens))

    def orders(self) -> Orders:
        orders, self._next = self._next, defaultdict(list)
        return orders

    def take(self, engine: str, step: Step) -> list[int]:
        return [int(end["id"]) for end in step["finished"]]


class Stages:
    """One engine prefills and picks the first token; the others decode, while it prefills the next prompts.

    A prompt needs a slot from the start of its prefill until a decode engine has taken up its keys and values.
    """

    def __init__(self, engines: Sequence[str], requests: Sequence[Request], slots: int, slot_bytes: int) -> None:
        self._prefill, *self._decoders = engines
        self._requests, self._slot_bytes = requests, slot_bytes
        self._free, self._slot = deque(range(slots)), dict[int, int]()
        self._waiting, self._decode = deque[int](), Orders()
        self._first: dict[int, int] = {}

    def arrive(self, index: int) -> None:
        self._waiting.append(index)

    def orders(self) -> Orders:
        orders, self._decode = self._decode, {}
        while self._waiting and self._free:
            index = self._waiting.popleft()
            self._slot[index] = self._free.popleft()
            request = self._requests[index]
            order = _order(index, request, request.prompt, 1, self._transfer(index, "save"))
            orders.setdefault(self._prefill, []).append(order)
        return orders

    def take(self, engine: str, step: Step) -> list[int]:
        if engine != self._prefill:
            for name, _ in step["tokens"]:
                self._release(int(name))
            return [int(end["id"]) for end in step["finished"]]
        self._first.update({int(name): tokens[0] for name, tokens in step["tokens"]})
        over = []
        for end in step["finished"]:
            index = int(end["id"])
            if end["reason"] != "length" or self._requests[index].sampling.max_new_tokens == 1:
                self._release(index)
                over.append(index)
            else:
                self._hand_over(index)
        return over

    def _hand_over(self, index: int) -> None:
        request = self._requests[index]
        prompt, left = [*request.prompt, self._first.pop(index)], request.sampling.max_new_tokens - 1
        order = _order(index, request, prompt, left, self._transfer(index, "load"))
        self._decode.setdefault(self._decoders[index % len(self._decoders)], []).append(order)

    def _release(self, index: int) -> None:
        if index in self._slot:
            self._free.append(self._slot.pop(index))

    def _transfer(self, index: int, what: str) -> dict[str, Any]:
        tokens = len(self._requests[index].prompt)
        return {"what": what, "offset": self._slot[index] * self._slot_bytes, "tokens": tokens}


def policy_of(placement: VllmPlacement, requests: Sequence[Request], slots: int, slot_bytes: int) -> Policy:
    """The policy of a mode over these requests."""
    names = [role.name for role in placement.roles]
    return Stages(names, requests, slots, slot_bytes) if placement.mode == "split" else Shares(names, requests)


def drive(team: Team, policy: Policy, requests: Sequence[Request], listen: Listener) -> None:
    """Give out requests as they are due and pass on steps until all have ended. Raises LaneError."""
    due = deque(sorted(range(len(requests)), key=lambda index: requests[index].arrival))
    left = set(due)
    while left:
        while due and requests[due[0]].arrival <= time.monotonic():
            policy.arrive(due.popleft())
        for engine, orders in policy.orders().items():
            team.send(engine, orders)
        pause = max(0.0, requests[due[0]].arrival - time.monotonic()) if due else None
        for engine, step in team.wait(pause):
            ended = policy.take(engine, step)
            listen(engine, step)
            if strange := [end for end in step["finished"] if end["reason"] not in ("stop", "length")]:
                raise LaneError(f"vLLM's {engine} gave up request {strange[0]['id']}: {strange[0]['reason']}.")
            left.difference_update(ended)


def _order(
    index: int, request: Request, prompt: list[int], new_tokens: int, transfer: dict[str, Any] | None = None
) -> dict[str, Any]:
    stop = sorted(request.sampling.stop_token_ids)
    return {"id": str(index), "prompt": prompt, "new_tokens": new_tokens, "stop": stop, "transfer": transfer}
