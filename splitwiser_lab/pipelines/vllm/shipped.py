"""vLLM as it comes, beside the pipeline's engines: one call of `LLM.generate` with its defaults.

It shows what the pipeline's own settings and its steps, told one by one, cost: what is bound by its front end would
look better with two of them, and that is no merit of sharing a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from splitwiser_lab.errors import LaneError
from splitwiser_lab.measure.vllm_peer import VllmPeer
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.runners import AllAtOnce, prompts_of

SHIPPED = "vLLM as shipped"


class ShippedRunner(AllAtOnce):
    """One engine with vLLM's defaults, which starts at the first launch or run."""

    def __init__(self, start: Callable[[], VllmPeer], model: Any) -> None:
        """`start` makes the engine and does not wait for it; `model` is transformers', whose prompts it gets."""
        self._start, self._model = start, model
        self._peer: VllmPeer | None = None

    def launch(self, workload: Workload) -> None:
        """Start it, unless it runs, and do not wait. Raises LaneError."""
        if self._peer is None:
            with self._failing():
                self._peer = self._start()

    def __call__(self, workload: Workload) -> tuple[dict[str, Any], list[list[int]]]:
        self.launch(workload)
        assert self._peer is not None
        prompts, new_tokens = prompts_of(workload, self._model), workload.arrivals[0].max_new_tokens
        with self._failing():
            seconds, tokens = self._peer.run(prompts, new_tokens)
        return {"duration": seconds, "output_throughput": sum(map(len, tokens)) / seconds}, tokens

    def close(self) -> None:
        """End it, also while it starts; the next run starts another."""
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.close()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.close()
            raise LaneError(f"{SHIPPED}: {error}") from error
