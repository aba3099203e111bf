"""The paper's Hugging Face pipeline, truly split: untouched models in processes that share one copy of the weights.

Splitwiser (Aali, Cardoza, Capo, arXiv 2505.03763) describes a prompt process that hands its keys and
values to a token process; its released code runs whole `generate` calls in each. Here both exist. It
runs eager transformers, one fixed batch after the other: what an engine gains by pages, by batches that
change at each step, and by CUDA graphs is not in it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from splitwiser_lab.engine.intake import Intake, Prompt
from splitwiser_lab.engine.request import Request
from splitwiser_lab.errors import RequestError, SplitwiserError
from splitwiser_lab.hardware import choose_device
from splitwiser_lab.pipelines.dispatch import drive, policy_of
from splitwiser_lab.pipelines.kv import layout_of
from splitwiser_lab.pipelines.memory import need, settled_free_bytes
from splitwiser_lab.pipelines.phases import PromptBatch
from splitwiser_lab.pipelines.placement import Placement
from splitwiser_lab.pipelines.result import PipelineResult, Progress
from splitwiser_lab.pipelines.shared_model import SharedModel
from splitwiser_lab.pipelines.source import Facts, SourceModel, load_source
from splitwiser_lab.pipelines.team import Team

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitwiser_lab.pipelines.phase_figures import PhaseFigures

BATCH_SIZE = 8


class HuggingFacePipeline:
    """A model whose weights are shared once, and worker processes that can be placed anew between two runs."""

    def __init__(self, source: SourceModel, device: str, placement: Placement) -> None:
        """Use `from_pretrained`. Raises ModelError for a model without keys and values to hand over."""
        placement.check(device)
        self.name, self.tokenizer, self.device = source.name, source.tokenizer, device
        self.random_weights = source.random_weights
        self.layout = layout_of(source.model)
        self.facts = Facts.of(source.model)
        self._config = source.model.config
        begun = perf_counter()
        self._shared: SharedModel | None = SharedModel(source.model, device)
        self.share_s = perf_counter() - begun  # seconds to copy the weights into shared memory, once
        self._intake = Intake(self.facts, self.tokenizer, self.facts.context)
        self._placement, self._team = placement, None

    _team: Team | None

    @classmethod
    def from_pretrained(
        cls,
        model: Any = "smollm2-135m",
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        mode: str = "sequential",
        processes: int | None = None,
        mps: bool = False,
        sm_shares: Sequence[int] | None = None,
    ) -> HuggingFacePipeline:
        """Load an alias, a folder, a Hub id, or take a loaded AutoModelForCausalLM; its modules stay as they are.

        Modes and options as in `set_mode`. A model that is given as an object keeps its own copy of the weights.
        """
        placement = Placement.of(mode, processes, mps, sm_shares)
        where = choose_device(device).value
        placement.check(where)
        return cls(load_source(model, where, dtype), where, placement)

    @property
    def placement(self) -> Placement:
        """The mode with its options."""
        return self._placement

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers by name, while they run: from the first run on."""
        return self._team.pids if self._team else {}

    @property
    def spawn_s(self) -> tuple[float, ...]:
        """Seconds until each of the running processes was ready, from the start of the first; empty before a run."""
        return tuple(self._team.spawn_seconds) if self._team else ()

    def set_mode(
        self, mode: str, processes: int | None = None, mps: bool = False, sm_shares: Sequence[int] | None = None
    ) -> None:
        """From the next run on: `sequential`, `replicas`, or `split` (one process prefills, the others decode).

        `mps`: the processes are clients of an MPS daemon of their own, with `sm_shares` percent of the SMs
        each. Raises ModeError for what does not exist or cannot run here.
        """
        placement = Placement.of(mode, processes, mps, sm_shares)
        placement.check(self.device)
        self._placement = placement

    def beside(self, mode: str, processes: int | None = None, mps: bool = False, **options: Any) -> HuggingFacePipeline:
        """Another pipeline over the same shared weights, with processes of its own. Options as in `set_mode`.

        Each is closed by itself; the weights go with the last.
        """
        other = copy.copy(self)
        other._team = None
        other.set_mode(mode, processes, mps, **options)
        return other

    def model(self) -> PreTrainedModel:
        """The transformers model over the same shared weights, in this process: to compare with, or to look at."""
        return self._weights().here()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        ignore_eos: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> PipelineResult:
        """Greedy tokens for prompts (texts, or lists of token ids) that are all there at the start."""
        wanted = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
        return self._run([self._intake.request(prompt, 0.0, None, wanted) for prompt in prompts], batch_size)

    def run(self, workload: Any, batch_size: int = BATCH_SIZE) -> PipelineResult:
        """Run a Workload in batches of `batch_size`, in the order of arrival; a batch starts once it is complete.

        `replicas` first divides the requests into equal shards, one for each process. The timer starts
        when every process is ready and prompts are token ids, and ends with the last token, in every mode.
        Raises RequestError for a request that does not fit, HardwareError where memory does not suffice,
        LaneError when a process fails; after each, the next run starts afresh.
        """
        return self._run(self._requests(workload), batch_size)

    def start(self, workload: Any, batch_size: int = BATCH_SIZE) -> None:
        """Start the processes for this workload, unless they run, so that a smaller run can warm them up."""
        self._ready(self._batches(self._requests(workload), batch_size)[0])

    def launch(self, workload: Any, batch_size: int = BATCH_SIZE) -> None:
        """Start the processes for this workload, unless they run, and do not wait for them: the next run does."""
        self._launched(self._batches(self._requests(workload), batch_size)[0])

    def profile(
        self, workload: Any, batch_size: int = BATCH_SIZE, seconds: float = 1.0
    ) -> tuple[PhaseFigures, PhaseFigures]:
        """Run prefill, then decode, of the first batch alone, in this process, each again and again for `seconds`.

        Raises RequestError when no request wants a second token.
        """
        from splitwiser_lab.pipelines.phase_profile import profile_phases

        batch = _batch(0, self._requests(workload)[:batch_size])
        return profile_phases(self.model(), self.layout, self.device, batch, seconds)

    def close(self) -> None:
        """End all processes and give back the shared memory. Closing twice does nothing."""
        self._stop()
        self._shared = None

    def __enter__(self) -> HuggingFacePipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _requests(self, workload: Any) -> list[Request]:
        due = workload.requests(vocab_size=self.facts.vocab_size, max_tokens=self.facts.context)
        return [
            self._intake.request(
                item.prompt,
                item.arrival_s,
                None,
                {"max_new_tokens": item.max_new_tokens, "ignore_eos": item.ignore_eos},
            )
            for item in due
        ]

    def _batches(
        self, requests: Sequence[Request], batch_size: int
    ) -> tuple[list[list[PromptBatch]], dict[int, list[Request]]]:
        """The batches of each shard, and the requests of each batch by its number."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise RequestError(f"batch_size={batch_size!r}: give a whole number of requests, 1 or more.")
        if not requests:
            raise RequestError("there are no prompts: give at least one.")
        count = self._placement.processes if self._placement.mode == "replicas" else 1
        ends = [len(requests) * shard // count for shard in range(count + 1)]
        members: dict[int, list[Request]] = {}
        shards: list[list[PromptBatch]] = [[] for _ in range(count)]
        for shard, (start, end) in enumerate(pairwise(ends)):
            for first in range(start, end, batch_size):
                chosen = list(requests[first : min(first + batch_size, end)])
                members[len(members)] = chosen
                shards[shard].append(_batch(len(members) - 1, chosen))
        return shards, members

    def _run(self, requests: Sequence[Request], batch_size: int) -> PipelineResult:
        shards, members = self._batches(requests, batch_size)
        team, spawned = self._ready(shards)
        batches = [batch for shard in shards for batch in shard]
        sizes = {b.number: self.layout.nbytes(len(b.prompts), b.longest) for b in batches}
        origin = perf_counter()
        for request in requests:
            request.arrival += origin
        progress = Progress(members, self._placement.mode, origin, sizes)
        try:
            drive(team, policy_of(self._placement, shards), batches, progress.listen, origin)
        except BaseException:  # also an interrupt: what is under way would answer into the next run
            self._stop()
            raise
        options = {"processes": self._placement.processes, "mps": self._placement.mps, "batch_size": batch_size}
        return PipelineResult(
            requests,
            progress.timeline(requests, options),
            self.tokenizer,
            placement=str(self._placement),
            spawn_s=spawned,
            hand_offs=tuple(progress.hand_offs),
            padding=sum(batch.padding for batch in batches),
        )

    def _ready(self, shards: list[list[PromptBatch]]) -> tuple[Team, tuple[float, ...]]:
        """The running team for these batches, and the seconds it took to start it (none if it was started before)."""
        team, new = self._launched(shards)
        team.await_ready()
        return team, tuple(team.spawn_seconds) if new else ()

    def _launched(self, shards: list[list[PromptBatch]]) -> tuple[Team, bool]:
        """The team for these batches, and whether it was started just now."""
        shared = self._weights()
        batches = [batch for shard in shards for batch in shard]
        rows = max(len(batch.prompts) for batch in batches)
        prompt = max(batch.longest for batch in batches)
        longest = max(batch.longest + max(batch.new_tokens) for batch in batches)
        slot_bytes = self.layout.nbytes(rows, prompt) if self._placement.mode == "split" else 0
        team = self._team
        if team and team.alive and team.placement == self._placement and team.slot_bytes >= slot_bytes:
            return team, False
        self._stop()
        split = self._placement.mode == "split"
        needed = need(self._placement.processes, split, self.layout, self._config, self.device, rows, (prompt, longest))
        needed.check(settled_free_bytes(self.device))
        self._team = Team(self._placement, shared, self.layout, self.device, slot_bytes)
        return self._team, True

    def _weights(self) -> SharedModel:
        if self._shared is None:
            raise SplitwiserError("this pipeline is closed: make a new one.")
        return self._shared

    def _stop(self) -> None:
        if self._team is not None:
            self._team.close()
        self._team = None


def _batch(number: int, requests: Sequence[Request]) -> PromptBatch:
    return PromptBatch(
        number,
        tuple(tuple(request.prompt) for request in requests),
        tuple(request.sampling.max_new_tokens for request in requests),
        tuple(request.sampling.stop_token_ids for request in requests),
        max(request.arrival for request in requests),
    )
