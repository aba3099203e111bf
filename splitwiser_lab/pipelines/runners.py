"""What does the work of a reproduction beside its pipeline: transformers' `generate`, and this package's engine."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol, cast, runtime_checkable

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.peers import GeneratePeer
from splitwiser_lab.measure.workload import Workload

_ENGINE_MODES = {"cpu": ("sequential", "processes"), "cuda": ("sequential", "streams")}


class Runner(Protocol):
    """A way to do the work: figures and tokens of one round."""

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]: ...


@runtime_checkable
class Launched(Protocol):
    """A way to do the work that has processes of its own."""

    def launch(self, workload: Workload) -> None:
        """Start them for work like this, unless they run, without waiting for them.

        Called again once all ways were: start those that had to wait for another's.
        """
        ...


class AllAtOnce:
    """A way to do the work that takes requests only when all are there."""


class GenerateRunner(AllAtOnce):
    """transformers' `generate` in this process, batch by batch."""

    def __init__(self, model: Any, batch: int) -> None:
        self._peer, self._model, self._batch = GeneratePeer(model), model, batch

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        prompts, new_tokens = prompts_of(workload, self._model), workload.arrivals[0].max_new_tokens
        seconds, tokens = 0.0, []
        for start in range(0, len(prompts), self._batch):
            taken, new = self._peer.run(prompts[start : start + self._batch], new_tokens)
            seconds += taken
            tokens += new
        return {"duration": seconds, "output_throughput": sum(map(len, tokens)) / seconds}, tokens


class EngineRunner:
    """This package's engine in one mode."""

    def __init__(self, engine: Engine, mode: str, batch: int) -> None:
        self._engine, self._mode, self._batch = engine, mode, batch

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        self._engine.set_mode(self._mode, max_batch=self._batch)
        result = self._engine.serve(workload)
        return result.metrics.to_dict(), result.tokens


def engine_runners(
    stack: ExitStack, model: str, device: str, dtype: str, batch: int, longest: int
) -> dict[str, Runner]:
    """This package's engine in one process and in two phases side by side, `batch` requests of up to `longest` tokens.

    It lives until the stack ends. Raises ModelError for a model that it does not run.
    """
    room = 2 * batch * (longest + 64)
    engine = stack.enter_context(Engine.from_pretrained(model, device=device, dtype=dtype, kv_tokens=room))
    kind = "cuda" if device.startswith("cuda") else "cpu"
    return {f"engine: {mode}": EngineRunner(engine, mode, batch) for mode in _ENGINE_MODES[kind]}


def prompts_of(workload: Workload, model: Any) -> list[list[int]]:
    """The random prompts of a workload, as token ids of this model."""
    items = workload.requests(int(model.config.get_text_config(decoder=True).vocab_size))
    return [cast(list[int], item.prompt) for item in items]
