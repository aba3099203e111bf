"""The same work by others: transformers' `generate` and `generate_batch`, and vLLM where it is installed.

A peer runs equal-length prompts greedily to exactly `new_tokens` tokens each, token ids in, token ids out,
so that no tokenizer and no padding is inside anybody's timer.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.op_times import OpTimes, op_times
from splitwiser_lab.measure.vllm_peer import vllm_over


class Peer(Protocol):
    """Somebody who can do the work."""

    name: str
    settings: str  # how it runs, and where that is not its default: for the figures' reader

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds taken, and the new tokens of each prompt."""
        ...

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        """The same under PyTorch's profiler: seconds in all, and in each operator; [] where it cannot look."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class OursPeer:
    """This package's engine in its present mode."""

    name = "splitwiser_lab"

    def __init__(self, engine: Engine) -> None:
        """`engine` stays the caller's to close."""
        self._engine = engine
        self.settings = f"mode {engine.mode}"

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """One call of `generate`."""
        start = time.perf_counter()
        tokens = self._engine.generate(prompts, new_tokens, ignore_eos=True).tokens
        return time.perf_counter() - start, tokens

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        """In a mode whose lanes are in this thread: of other processes nothing is seen."""
        return _profiled(self, prompts, new_tokens)

    def close(self) -> None:
        """Nothing of its own."""


class _TransformersPeer:
    """What both of transformers' ways share: a model, which stays the caller's."""

    def __init__(self, model: Any) -> None:
        """`model` is an AutoModelForCausalLM in eval mode."""
        self._model = model

    def close(self) -> None:
        """Nothing of its own."""


class GeneratePeer(_TransformersPeer):
    """transformers' `generate`, all prompts in one batch."""

    name = "HF generate"
    settings = "all prompts in one batch"

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """One call of `generate`, greedy, until every row has `new_tokens`."""
        import torch

        ids = torch.tensor(prompts, device=self._model.device)
        settings = {"temperature": None, "top_p": None, "top_k": None, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            start = time.perf_counter()
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                **settings,
            )
            tokens = out[:, len(prompts[0]) :].tolist()  # waits for the device
            return time.perf_counter() - start, tokens

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        """As it stands."""
        return _profiled(self, prompts, new_tokens)


class GenerateBatchPeer(_TransformersPeer):
    """transformers' continuous batching over pages, as `generate_batch` sets it up.

    Its manager, cache and CUDA graphs are made by a `generate_batch` outside of the timer, before the first call and
    before one that needs a larger cache, and stay for the calls after it: other engines are started beforehand, too.
    """

    name = "HF generate_batch"
    settings = "manager, cache and graphs kept between calls; pages of 32 tokens, none shared by prompts"

    def __init__(self, model: Any) -> None:
        """`model` is an AutoModelForCausalLM in eval mode. It holds the manager until `close`."""
        super().__init__(model)
        self._room = (0, 0)  # prompts, and tokens of each, that the manager was made for

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """All prompts to the waiting manager, until its last answer. Raises RuntimeError when it fails."""
        self._make_room(prompts, new_tokens)
        with self._model.continuous_batching_context_manager(persistent_manager=True) as manager:
            start = time.perf_counter()
            names = manager.add_requests(prompts, max_new_tokens=new_tokens)
            found: dict[str, list[int]] = {}
            while len(found) < len(prompts):
                output = manager.get_result(timeout=1)
                if output is None:
                    if not manager.is_running():
                        raise RuntimeError("the generation thread of generate_batch ended before all was written")
                elif output.error is not None:
                    raise RuntimeError(f"generate_batch: {output.error}")
                elif output.is_finished():
                    found[output.request_id] = [int(token) for token in output.generated_tokens]
            return time.perf_counter() - start, [found[name] for name in names]

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        """It computes in a thread of its own, which the profiler does not see."""
        return self.run(prompts, new_tokens)[0], []

    def close(self) -> None:
        """End the manager and give back its cache."""
        self._model.destroy_cached_continuous_batching_manager()
        self._room = (0, 0)

    def _make_room(self, prompts: list[list[int]], new_tokens: int) -> None:
        """A manager for these requests, as large as a user's `generate_batch` of them, unless there is one."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        count, tokens = len(prompts), len(prompts[0]) + new_tokens
        if count <= self._room[0] and tokens <= self._room[1]:
            return
        self.close()
        page = 32
        known = inspect.signature(ContinuousBatchingConfig).parameters
        size_of_page = "page_size" if "page_size" in known else "block_size"  # its name before transformers 5.18
        sizes: dict[str, Any] = {
            size_of_page: page,
            "num_blocks": count * -(-tokens // page) + 8,
            "max_batch_tokens": 512 if self._model.device.type == "cpu" else 8192,  # as our own prefill batches there
            "allow_block_sharing": False,  # else a later round would find the prompts of an earlier one
        }
        self._model.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(**sizes),
            progress_bar=False,
            persistent_manager=True,
        )
        self._room = (count, tokens)


def _profiled(peer: Peer, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
    seconds: list[float] = []
    times = op_times(lambda: seconds.append(peer.run(prompts, new_tokens)[0]))
    return seconds[0], times


def find_vllm(python: str | None = None) -> str | None:
    """A Python that can import vLLM: the one given, this one, or the one that `make vllm` made; None without."""
    if python is not None:
        return python
    here = importlib.util.find_spec("vllm")
    if here is not None and here.origin:  # and no mere folder of that name
        return sys.executable
    places = (folder / ".venv-vllm" / "bin" / "python" for folder in (Path.cwd(), Path(__file__).parents[2]))
    return next((str(local) for local in places if local.exists()), None)


def find_peers(engine: Engine, model: Any, vllm_python: str | None = None) -> tuple[list[Peer], dict[str, str]]:
    """Everybody who can do the work here, ours first, and why the others cannot. `model`: the reference."""
    peers: list[Peer] = [OursPeer(engine), GeneratePeer(model)]
    missing: dict[str, str] = {}
    if importlib.util.find_spec("transformers") and hasattr(model, "generate_batch"):
        peers.append(GenerateBatchPeer(model))
    else:
        missing["HF generate_batch"] = "this transformers has no generate_batch"
    python = find_vllm(vllm_python)
    if python is None:
        missing["vLLM"] = (
            "not installed: `make vllm` puts it in an environment of its own; or name its Python by --vllm"
        )
    elif engine.model.folder is None and not engine.model.random_weights:
        missing["vLLM"] = "it needs the model in a folder, and this one was given as an object"
    else:
        try:
            peers.append(vllm_over(engine, python))
        except (RuntimeError, OSError) as error:
            missing["vLLM"] = str(error)
    return peers, missing
