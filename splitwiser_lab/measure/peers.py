"""The same work by others: transformers' `generate` and `generate_batch`, and vLLM where it is installed.

A peer runs equal-length prompts greedily to exactly `new_tokens` tokens each, token ids in, token ids out,
so that no tokenizer and no padding is inside anybody's timer.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Protocol

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.op_times import OpTimes, op_times
from splitwiser_lab.model.shapes import shape_config

_VLLM_SHARE = 0.85  # of the GPU memory that our engine and the reference leave free
_WORKER = Path(__file__).with_name("vllm_worker.py")


class Peer(Protocol):
    """Somebody who can do the work."""

    name: str

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
    """transformers' `generate_batch`: its continuous batching over pages."""

    name = "HF generate_batch"

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """One call of `generate_batch`; its cache is sized for these prompts, as a user would."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        page = 32
        known = inspect.signature(ContinuousBatchingConfig).parameters
        size_of_page = "page_size" if "page_size" in known else "block_size"  # its name before transformers 5.18
        blocks = len(prompts) * -(-(len(prompts[0]) + new_tokens) // page) + 8
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        budget = 512 if self._model.device.type == "cpu" else 8192  # as our own prefill batches there
        sizes: dict[str, Any] = {"num_blocks": blocks, "max_batch_tokens": budget, size_of_page: page}
        batching = ContinuousBatchingConfig(**sizes)
        start = time.perf_counter()
        out = self._model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
        tokens = [[int(token) for token in output.generated_tokens] for output in out.values()]
        return time.perf_counter() - start, tokens

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        """It computes in a thread of its own, which the profiler does not see."""
        return self.run(prompts, new_tokens)[0], []


class VllmPeer:
    """vLLM in a process of its own, with its own Python: it wants other versions than this package."""

    name = "vLLM"

    def __init__(
        self, python: str, folder: Path, dtype: str, device: str, max_tokens: int, random_weights: bool = False
    ) -> None:
        """Start an engine over the model in `folder`, which needs only a config.json for `random_weights`.

        On a GPU it takes most of the memory that is free now. Raises RuntimeError with vLLM's own words.
        """
        settings: dict[str, Any] = {"model": str(folder), "dtype": dtype, "cpu": device == "cpu"}
        settings |= {"max_model_len": max_tokens, "random_weights": random_weights, "memory_share": None}
        if device != "cpu":
            import torch

            free, total = torch.cuda.mem_get_info(device)
            settings["memory_share"] = round(_VLLM_SHARE * free / total, 3)
        self._process = subprocess.Popen(
            [python, str(_WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.name = f"vLLM {self._ask(None)['version']}"

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """One call of vLLM's `LLM.generate`; the timer runs there, without the pipe."""
        answer = self._ask({"prompts": prompts, "new_tokens": new_tokens})
        return answer["seconds"], answer["tokens"]

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        """Its own operators, in its own process."""
        answer = self._ask({"prompts": prompts, "new_tokens": new_tokens, "profile": True})
        return answer["seconds"], [(name, seconds) for name, seconds in answer["ops"]]

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                stream.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, question: dict[str, Any] | None) -> dict[str, Any]:
        if question is not None:
            _open(self._process.stdin).write(json.dumps(question) + "\n")
            _open(self._process.stdin).flush()
        for line in _open(self._process.stdout):
            if line.startswith("{"):  # vLLM also logs there
                answer: dict[str, Any] = json.loads(line)
                return answer
        said = [line for line in _open(self._process.stderr).read().splitlines() if line.strip()]
        raise RuntimeError(f"vLLM ended: {said[-1] if said else 'it said nothing'}")


def _profiled(peer: Peer, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
    seconds: list[float] = []
    times = op_times(lambda: seconds.append(peer.run(prompts, new_tokens)[0]))
    return seconds[0], times


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


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
            peers.append(_vllm(engine, python))
        except (RuntimeError, OSError) as error:
            missing["vLLM"] = str(error)
    return peers, missing


def _vllm(engine: Engine, python: str) -> VllmPeer:
    """vLLM over the engine's model; over the same shape with weights of its own where ours are random."""
    dtype, most = str(engine.dtype).removeprefix("torch."), min(2048, engine.config.context)
    if engine.model.folder is not None:
        return VllmPeer(python, engine.model.folder, dtype, engine.device, most)
    with tempfile.TemporaryDirectory(prefix="splitwiser-shape-") as folder:
        shape_config(engine.model.name).save_pretrained(folder)
        return VllmPeer(python, Path(folder), dtype, engine.device, most, random_weights=True)
