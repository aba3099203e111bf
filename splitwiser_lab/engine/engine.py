"""The engine as people use it: load a model, generate, serve, stream, change the mode, close.

What happens in a step is in `core`; which modes exist in `modes`; this file turns prompts into
requests and requests into results.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from splitwiser_lab.engine.auto import Governor, govern
from splitwiser_lab.engine.core import Core
from splitwiser_lab.engine.intake import Intake, Prompt
from splitwiser_lab.engine.modes import find_mode
from splitwiser_lab.engine.open_loop import OpenLoop
from splitwiser_lab.engine.pages import PageAllocator
from splitwiser_lab.engine.request import Request
from splitwiser_lab.engine.result import Result, cut_at_stop, decode, settled, timeline_of
from splitwiser_lab.engine.scheduler import DEFAULT_LIMITS, Limits
from splitwiser_lab.engine.station import ModeSwitch, Station
from splitwiser_lab.engine.warm_up import Report, WarmUp
from splitwiser_lab.errors import GenerationError, SplitwiserError
from splitwiser_lab.hardware import choose_device, choose_dtype
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.lanes.factory import LaneHouse, share_cores, start_all
from splitwiser_lab.lanes.support import LaneKind
from splitwiser_lab.model.kv_pool import KVPool, pages_for
from splitwiser_lab.model.loading import LoadedModel, load
from splitwiser_lab.model.transformer import Transformer
from splitwiser_lab.timeline import ModeChange, Timeline

PAGE_SIZE = 32


class Engine:
    """One model, one KV pool, and lanes that can be changed while requests are in flight."""

    def __init__(
        self,
        model: LoadedModel,
        pool: KVPool,
        mode: str = "sequential",
        seed: int = 0,
        *,
        warm_up: bool = True,
        report: Report | None = None,
        **options: Any,
    ) -> None:
        """Use `from_pretrained` unless you have loaded the parts yourself."""
        self.model, self.pool, self.seed = model, pool, seed
        self.config, self.tokenizer = model.config, model.tokenizer
        self.device, self.dtype = model.weights.device, model.weights.dtype
        model.weights.pack()
        self._transformer = Transformer(model.weights, pool)
        self._intake = Intake(self.config, self.tokenizer, pool.tokens)
        self._house = LaneHouse(self._transformer)
        self._lanes_lock = threading.Lock()
        self._default_limits = DEFAULT_LIMITS[torch.device(self.device).type]
        self._core = Core(PageAllocator(pool.pages, pool.page_size), self._default_limits, self._intake.ends)
        self._governor: Governor | None = None
        self._warm_up = WarmUp(self._core, warm_up, report)
        self.set_mode(mode, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: Any = "smollm2-135m",
        *,
        device: str = "auto",
        dtype: Any = "auto",
        mode: str = "sequential",
        kv_tokens: int | None = None,
        page_size: int | None = None,
        seed: int = 0,
        warm_up: bool = True,
        report: Report | None = None,
        **options: Any,
    ) -> Engine:
        """Load `model` (an alias, a local folder, a Hub id, or a loaded transformers model) and make it ready.

        `kv_tokens` is the capacity of the KV pool; None sizes it from free memory. `options` are the
        mode's, as in `set_mode`. With `warm_up`, the lanes of a mode on a GPU compile kernels and capture graphs of
        usual batches when they are first chosen, a second or a few for each, and `report` is told so in lines;
        without, the first batches of each shape are slow. Raises ModelError, HardwareError or ModeError.
        """
        where = choose_device(device).value
        find_mode(mode, where).check(options, where)  # before anything is loaded
        kind = getattr(torch, choose_dtype(where, dtype).value)
        loaded = load(model, where, kind)
        size = PAGE_SIZE if page_size is None else page_size
        warm: dict[str, Any] = {"warm_up": warm_up, "report": report}
        pages = pages_for(loaded.config, kind, where, size, kv_tokens)
        return cls(loaded, KVPool(loaded.config, kind, where, pages, size), mode, seed, **warm, **options)

    @property
    def mode(self) -> str:
        """The mode under which batches are scheduled now."""
        return self._core.mode.mode

    @property
    def limits(self) -> Limits:
        """What batches may hold now: requests at once, tokens of a prefill batch and of a mixed one."""
        return self._core.scheduler.limits

    @property
    def longest_request(self) -> int:
        """The most tokens, prompt and output, that one request can have."""
        return self._intake.longest

    @property
    def kv_use(self) -> float:
        """Share of the pool's pages that belong to requests, 0 to 1. Raises SplitwiserError once closed."""
        self._refuse_if_closed()
        return 1 - self._core.scheduler.pages.free / self.pool.pages

    def set_mode(self, mode: str, **options: Any) -> None:
        """Change how phases map to lanes, at any time and from any thread; requests in flight go on.

        New lanes are started here, before the old ones drain, so that work goes on meanwhile. Takes
        effect at the next step boundary. Raises ModeError, or LaneError when a lane cannot start;
        the mode then stays as it was.
        """
        self._refuse_if_closed()
        found = find_mode(mode, self.device)
        found.check(options, self.device)
        if found.lanes:
            self._governor, switch = None, self._prepare(mode, options)
        else:
            chunk = self._default_limits.chunk_tokens
            running = self._house.running()
            self._governor = govern(self._core, self._prepare, self.device, chunk, options, running)
            switch = self._governor.start
        self._core.switch(switch)

    def explain(self) -> str:
        """Why what runs now was chosen, in sentences with numbers. Raises SplitwiserError once closed."""
        self._refuse_if_closed()
        if self._governor is not None:
            return self._governor.explain()
        return f"{self.mode} runs because it was asked for: set_mode('auto') lets measured rates choose."

    def _prepare(self, mode: str, options: dict[str, Any]) -> ModeSwitch:
        """Start the lanes of a mode that has some, and give the switch to it."""
        with self._lanes_lock:
            stations = [
                Station(self._house.lane(kind, name, options), policy)
                for name, (kind, policy) in find_mode(mode, self.device).lanes.items()
            ]
            lanes = [station.lane for station in stations]
            shares = share_cores(lanes, options.get("decode_cores"))
            self._house.close_rivals(lanes, self._core.lanes)
            start_all(lanes)
        limits = self._default_limits.with_options(options)
        self._warm_up(mode, stations, limits)
        return ModeSwitch(ModeChange(0.0, mode, options), stations, limits, shares)

    def submit(
        self,
        prompt: Prompt,
        *,
        on_token: Callable[[Request, int], None] | None = None,
        arrival: float | None = None,
        **sampling: Any,
    ) -> Request:
        """Queue one request and return its handle; `run` (or any call that runs others) carries it out.

        `sampling` as in `generate`. `on_token(request, token)` is called for each token as it comes.
        """
        self._refuse_if_closed()
        request = self._intake.request(prompt, arrival, on_token, sampling)
        self._core.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request at the next step boundary, from any thread. What it has generated stays."""
        self._core.cancel(request)

    def run(self) -> None:
        """Carry out all requests submitted so far."""
        self._refuse_if_closed()
        self._core.drive(lambda: self._core.quiet)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        ignore_eos: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        on_token: Callable[[Request, int], None] | None = None,
    ) -> Result:
        """Run prompts (texts, or lists of token ids) to their end; results come in the same order.

        Greedy at `temperature` 0. The same `seed` (the engine's when None) gives the same tokens in every
        mode. Raises RequestError before anything runs when a prompt cannot be served, and GenerationError
        at the end, with the finished part in its `result`, when some requests failed.
        """
        self._refuse_if_closed()
        origin = time.perf_counter()
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "stop": stop}
        sampling |= {"temperature": temperature, "top_p": top_p}
        requests = self._intake.requests(prompts, origin, on_token, sampling, self.seed if seed is None else seed)
        for request in requests:
            self._core.add(request)
        try:
            self._core.drive(lambda: all(request.done for request in requests))
        finally:
            self._core.abandon(requests)  # after an interrupt; else there is nothing left to end
        result = self._result(requests, origin)
        if result.errors:
            raise GenerationError(
                f"{len(result.errors)} of {len(requests)} requests failed; the first: {result.errors[0]} "
                "What finished is in this error's `result`.",
                result,
            ) from result.errors[0]
        return result

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[str]:
        """Yield the text of one request piece by piece as its tokens come. Closing the iterator cancels it."""
        request = self.submit(prompt, **sampling)
        sent, known, over = "", 0, False
        try:
            while not over:  # not `request.done`: another thread may have driven it to its end meanwhile
                self._core.drive(functools.partial(_has_more, request, known))
                over, known = request.done, len(request.output)
                text = cut_at_stop(decode(self.tokenizer, request.output[:known]), request.sampling.stop)
                if not over:
                    text = settled(text, request.sampling.stop)
                if len(text) > len(sent):
                    yield text[len(sent) :]
                    sent = text
        finally:
            self._core.abandon([request])
        if request.error is not None:
            raise request.error

    def serve(self, workload: Any, seconds: float | None = None) -> Result:
        """Open loop: requests arrive by the workload's clock, whether or not the engine keeps up.

        Stops when all are done, or after `seconds`, cancelling what is then unfinished. A request that
        cannot be served is recorded as refused, with its error in `result.errors`; the others go on.
        """
        self._refuse_if_closed()
        due = workload.requests(vocab_size=self.config.vocab_size, max_tokens=self.longest_request)
        origin = time.perf_counter()
        loop = OpenLoop(self._core, self._intake, due, self.seed, origin, seconds)
        try:
            self._core.drive(loop.over, loop.admit)
        finally:
            self._core.abandon(loop.requests)
        return self._result(loop.requests, origin)

    def timeline(self, since: float = 0.0, requests: Sequence[Request] = (), origin: float | None = None) -> Timeline:
        """What the lanes have done since `since` on `time.perf_counter`'s clock, for a live view.

        Times count from `origin` (None: from `since`).
        """
        return timeline_of(requests, list(self._core.spans), self._core.modes, since, origin)

    def tokenize(self, prompt: str, chat: bool = False) -> list[int]:
        """Token ids of a text; with `chat`, as one user turn in the model's chat template."""
        return self._intake.tokenize(prompt, chat)

    def new_lane(self, kind: LaneKind, name: str, **options: Any) -> Lane:
        """A lane of your own over this engine's weights and pool, to use by hand. Close it before the engine.

        `options` are those of a mode with such lanes, e.g. `decode_sms`.
        """
        self._refuse_if_closed()
        return self._house.build(kind, name, options)

    def close(self) -> None:
        """End all lanes and give back all memory. Requests under way end as cancelled; calling it again is fine."""
        self._core.close()
        with self._lanes_lock:
            if house := self.__dict__.get("_house"):
                house.close()
        for held in ("model", "pool", "_transformer", "_house", "_governor", "_warm_up"):
            self.__dict__.pop(held, None)
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()  # PyTorch would keep it for itself, and other processes want it too

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._core.closed:
            return "Engine(closed)"
        return (
            f"Engine({self.model.name!r}, device={self.device!r}, dtype={str(self.dtype).removeprefix('torch.')!r}, "
            f"mode={self.mode!r}, kv_tokens={self.pool.tokens})"
        )

    def _result(self, requests: list[Request], origin: float) -> Result:
        return Result(requests, self.timeline(origin, requests), self.tokenizer)

    def _refuse_if_closed(self) -> None:
        if self._core.closed:
            raise SplitwiserError("this engine is closed: load a new one with Engine.from_pretrained.")


def _has_more(request: Request, known: int) -> bool:
    return request.done or len(request.output) > known
