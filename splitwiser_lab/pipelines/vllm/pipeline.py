"""The paper's vLLM pipeline: engines of today's vLLM side by side on one device, or split into the two phases.

Splitwiser (Aali, Cardoza, Capo, arXiv 2505.03763) starts N engines of an old vLLM, each with 0.9 / N of the
memory. Here the engines are untouched, and their public interfaces (engine, request metrics, KV connectors) are
all that is used.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from splitwiser_lab.engine.intake import Intake, Prompt
from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import RequestError, SplitwiserError
from splitwiser_lab.hardware import choose_device
from splitwiser_lab.measure.vllm_peer import VllmPeer
from splitwiser_lab.pipelines.vllm.dispatch import drive, policy_of
from splitwiser_lab.pipelines.vllm.memory import BLOCK_SIZE, Work, whole_kv_bytes
from splitwiser_lab.pipelines.vllm.placement import VllmPlacement
from splitwiser_lab.pipelines.vllm.process import vllm_python as find_python
from splitwiser_lab.pipelines.vllm.result import Progress, VllmResult
from splitwiser_lab.pipelines.vllm.settings import EngineSettings
from splitwiser_lab.pipelines.vllm.source import VllmModel, load_vllm_model
from splitwiser_lab.pipelines.vllm.team import EngineFacts, Team

MOST_AT_ONCE = {"cpu": 64, "cuda": 256}  # requests in an engine's batch


class VllmPipeline:
    """A model, and vLLM engines over it that start with the first run and stay until the mode changes."""

    def __init__(
        self, model: VllmModel, device: str, placement: VllmPlacement, python: str, settings: EngineSettings
    ) -> None:
        """Use `from_pretrained`."""
        placement.check(device)
        self.name, self.device, self.facts, self.tokenizer = model.name, device, model.facts, model.tokenizer
        self.random_weights, self.dtype = model.random_weights, model.dtype
        self._model, self._python, self._placement, self._settings = model, python, placement, settings
        self._intake = Intake(model.facts, model.tokenizer, model.facts.context)
        self._team, self._closed = None, False

    _team: Team | None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "smollm2-135m",
        device: str = "auto",
        dtype: str = "auto",
        mode: str = "sequential",
        engines: int | None = None,
        *,
        chunk_tokens: int | None = None,
        connector: str | None = None,
        mps: bool = False,
        sm_shares: Sequence[int] | None = None,
        eager: bool = False,
        max_batch: int | None = None,
        vllm_python: str | None = None,
    ) -> VllmPipeline:
        """An alias, a folder, a Hub id, or a shape with random weights; modes and options as in `set_mode`.

        `eager`: no CUDA graphs and nothing compiled, as older versions worked (a CPU's engines always work so).
        `max_batch`: requests that each engine runs at once at most. `vllm_python` is the Python of an
        environment with vLLM (None: this one, or the one that `make vllm` made). Raises ModeError without vLLM,
        ModelError, HardwareError.
        """
        placement = VllmPlacement.of(mode, engines, chunk_tokens, connector, mps, sm_shares)
        settings = EngineSettings(eager, max_batch)
        where = choose_device(device).value
        placement.check(where)
        python = find_python(vllm_python)
        return cls(load_vllm_model(model, where, dtype), where, placement, python, settings)

    @property
    def placement(self) -> VllmPlacement:
        """The mode with its options."""
        return self._placement

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the engines by name, while they run."""
        return self._team.pids if self._team else {}

    @property
    def engines(self) -> tuple[EngineFacts, ...]:
        """vLLM's version and the size of the KV cache of each running engine."""
        return tuple(self._team.facts) if self._team else ()

    @property
    def spawn_s(self) -> tuple[float, ...]:
        """Seconds until each of the running engines was ready, counted from the start of the first."""
        return tuple(self._team.spawn_seconds) if self._team else ()

    @property
    def budget(self) -> str:
        """The sum by which the memory of the running engines was divided."""
        return self._team.budget.sum if self._team else "no engine runs"

    def shipped(self, workload: Any) -> VllmPeer:
        """An engine over the same folder with vLLM's defaults, and room for all requests of a workload at once.

        It starts now; its first run waits for it.
        """
        work = self._work(self._requests(workload))
        kv_bytes = whole_kv_bytes(work, self._model)
        return VllmPeer(self._python, self.dtype, self.device, work.total, self._model.folder, kv_bytes, wait=False)

    def set_mode(
        self,
        mode: str,
        engines: int | None = None,
        *,
        chunk_tokens: int | None = None,
        connector: str | None = None,
        mps: bool = False,
        sm_shares: Sequence[int] | None = None,
    ) -> None:
        """From the next run on: `sequential`, `replicas`, or `split` (one engine prefills, the others decode).

        `chunk_tokens`: cut prompts into chunks of this many tokens (vLLM's chunked prefill), None: leave them
        whole. `connector`, in `split`: `shared` (ours, through shared memory) or `example` (vLLM's own, through
        files). `mps`: engines are clients of an MPS daemon of their own, with `sm_shares` percent of the SMs
        each. Raises ModeError for what does not exist or cannot run here.
        """
        placement = VllmPlacement.of(mode, engines, chunk_tokens, connector, mps, sm_shares)
        placement.check(self.device)
        self._placement = placement

    def beside(self, mode: str, engines: int | None = None, **options: Any) -> VllmPipeline:
        """Another pipeline over the same folder, with engines of its own. Options as in `set_mode`."""
        other = copy.copy(self)
        other._team = None
        other.set_mode(mode, engines, **options)
        return other

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int = 64, ignore_eos: bool = False) -> VllmResult:
        """Greedy tokens for prompts (texts, or lists of token ids) that are all there at the start."""
        wanted = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
        return self._run([self._intake.request(prompt, 0.0, None, wanted) for prompt in prompts])

    def run(self, workload: Any) -> VllmResult:
        """Run a Workload; requests are given to vLLM when they are due.

        The timer starts when every engine is ready and prompts are token ids. Raises RequestError for a request
        that does not fit, HardwareError with the sum where memory does not suffice, LaneError when an engine
        fails; after each, the next run starts afresh.
        """
        return self._run(self._requests(workload))

    def start(self, workload: Any) -> None:
        """Start the engines for this workload, unless they run, so that a smaller run can warm them up."""
        self._ready(self._requests(workload))

    def launch(self, workload: Any) -> None:
        """Start the engines for this workload, unless they run, and do not wait for them: the next run does.

        On a GPU an engine waits for another that compiles for the same; called again, this starts it, too.
        """
        team, new = self._launched(self._requests(workload))
        if not new:
            team.start_rest()

    def close(self) -> None:
        """End all engines. Closing twice does nothing."""
        self._stop()
        self._closed = True

    def __enter__(self) -> VllmPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _requests(self, workload: Any) -> list[Request]:
        due = workload.requests(vocab_size=self.facts.vocab_size, max_tokens=self.facts.context)
        wanted = [{"max_new_tokens": item.max_new_tokens, "ignore_eos": item.ignore_eos} for item in due]
        return [self._intake.request(i.prompt, i.arrival_s, None, w) for i, w in zip(due, wanted, strict=True)]

    def _run(self, requests: Sequence[Request]) -> VllmResult:
        team, spawned = self._ready(requests)
        progress = Progress(requests, self._placement)
        policy = policy_of(self._placement, requests, team.budget.slots, team.budget.slot_bytes)
        origin = time.monotonic()
        for request in requests:
            request.arrival += origin
        try:
            drive(team, policy, requests, progress.listen)
            hand_offs = progress.hand_offs(team.moved())
        except BaseException:  # also an interrupt: what is under way would answer into the next run
            self._stop()
            raise
        team.clear()
        options = {"engines": self._placement.engines, "connector": self._placement.connector}
        return VllmResult(
            requests,
            progress.timeline(origin, {name: value for name, value in options.items() if value is not None}),
            self.tokenizer,
            placement=str(self._placement),
            spawn_s=spawned,
            hand_offs=hand_offs,
            engines=tuple(team.facts),
        )

    def _ready(self, requests: Sequence[Request]) -> tuple[Team, tuple[float, ...]]:
        """The running engines for these requests, and the seconds it took to start them (none if started before)."""
        team, new = self._launched(requests)
        team.await_ready()
        return team, tuple(team.spawn_seconds) if new else ()

    def _launched(self, requests: Sequence[Request]) -> tuple[Team, bool]:
        """The engines for these requests, and whether they were started just now."""
        if self._closed:
            raise SplitwiserError("this pipeline is closed: make a new one.")
        if not requests:
            raise RequestError("there are no prompts: give at least one.")
        work = self._work(requests)
        team = self._team
        if team and team.alive and team.placement == self._placement and team.work.covers(work):
            return team, False
        if team and team.placement == self._placement:
            work = work.joined(team.work)
        self._stop()
        self._team = Team(self._python, self._placement, self._model, self.device, work, self._settings)
        return self._team, True

    def _work(self, requests: Sequence[Request]) -> Work:
        kind = "cuda" if self.device.startswith("cuda") else "cpu"
        block = BLOCK_SIZE[kind]
        longest = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
        total = min(-(-longest // block) * block, self.facts.context)
        prompt = max(len(request.prompt) for request in requests)
        return Work(prompt, total, min(len(requests), MOST_AT_ONCE[kind]), len(requests))

    def _stop(self) -> None:
        if self._team is not None:
            self._team.close()
        self._team = None
