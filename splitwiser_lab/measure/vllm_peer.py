"""vLLM beside our engine, in a process of its own, with its own Python: it wants other versions than this package.

It runs as it comes, compiled, on a GPU with CUDA graphs and with the engine in a process beside its front end. On a
CPU all of it is in one process: by default a core is set aside for the engine's scheduler, which is half of a small
machine, and our side computes on every core. There PyTorch's profiler sees its operators, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.measure.op_times import OpTimes
from splitwiser_lab.model.shapes import shape_config

_END_SECONDS = 20.0
_SHARE = 0.85  # of the GPU memory that our engine and the reference leave free
_WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmPeer:
    """One vLLM engine."""

    def __init__(
        self,
        python: str,
        dtype: str,
        device: str,
        max_tokens: int,
        model: Path | str,
        kv_bytes: int | None = None,
        wait: bool = True,
    ) -> None:
        """Over the model in a folder, or with random weights in a shape of this package, given by its name.

        On a GPU it takes most of the memory that is free now, or `kv_bytes` for its cache. Without `wait` it may not
        be ready yet, see `ready`. Raises RuntimeError with vLLM's own words.
        """
        self._shape: tempfile.TemporaryDirectory[str] | None = None
        if isinstance(model, str):
            self._shape = tempfile.TemporaryDirectory(prefix="splitwiser-shape-")
            shape_config(model).save_pretrained(self._shape.name)
        eager = device == "cpu" and not has_compiler()
        self._order: dict[str, Any] = {
            "model": self._shape.name if self._shape else str(model),
            "dtype": dtype,
            "cpu": device == "cpu",
            "max_model_len": max_tokens,
            "random_weights": self._shape is not None,
            "memory_share": None if device == "cpu" else _memory_share(device, kv_bytes),
            "kv_bytes": None if device == "cpu" else kv_bytes,
            "eager": eager,
        }
        # A file, since a pipe that nobody reads fills up; `close` closes it.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.name, self.settings = "vLLM", settings_of(self._order)
        self._family: set[psutil.Process] = set()
        self._process = self._started(python, device)
        if wait:
            self.ready()

    def ready(self) -> None:
        """Wait until it takes prompts; from then on its name has the version. Raises RuntimeError."""
        if self._family:
            return
        try:
            version = self._ask(None)["version"]
        except BaseException:
            self.close()
            raise
        self._family = _family(self._process.pid)
        self.name = f"vLLM {version}{', eager' if self._order['eager'] else ''}"

    def _started(self, python: str, device: str) -> subprocess.Popen[str]:
        words, pipe = [python, str(_WORKER), json.dumps(self._order)], subprocess.PIPE
        around = {**os.environ, **({} if device == "cpu" else _only(device))}
        try:
            return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=self._said, text=True, env=around)
        except OSError as error:
            self._said.close()
            if self._shape is not None:
                self._shape.cleanup()
            why = error.strerror or type(error).__name__
            raise RuntimeError(f"vLLM's Python {Path(python).name!r} cannot be started: {why}") from error

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """One call of vLLM's `LLM.generate`; the timer runs there, without the pipe."""
        self.ready()
        answer = self._ask({"prompts": prompts, "new_tokens": new_tokens})
        return answer["seconds"], answer["tokens"]

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        """On a CPU its own operators; on a GPU [], since the engine is in a process that the profiler does not see."""
        if not self._order["cpu"]:
            return self.run(prompts, new_tokens)[0], []
        answer = self._ask({"prompts": prompts, "new_tokens": new_tokens, "profile": True})
        return answer["seconds"], [(name, seconds) for name, seconds in answer["ops"]]

    def close(self) -> None:
        """End its processes."""
        patience = _END_SECONDS if self._family else 0.0  # while it starts it does not listen
        family = self._family | _family(self._process.pid)
        with suppress(BrokenPipeError):
            _open(self._process.stdin).close()  # it ends by itself then, and its engine with it
        _open(self._process.stdout).close()
        for left in psutil.wait_procs(family, patience)[1]:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        self._process.wait()
        self._said.close()
        if self._shape is not None:
            self._shape.cleanup()

    def _ask(self, question: dict[str, Any] | None) -> dict[str, Any]:
        if question is not None:
            with suppress(BrokenPipeError):  # then it has ended, and its last words say why
                _open(self._process.stdin).write(json.dumps(question) + "\n")
                _open(self._process.stdin).flush()
        for line in _open(self._process.stdout):
            if line.startswith("{"):  # vLLM also logs there
                answer: dict[str, Any] = json.loads(line)
                return answer
        self._said.seek(0)
        said = [line for line in self._said.read().splitlines() if line.strip()]
        raise RuntimeError(f"vLLM ended: {said[-1] if said else 'it said nothing'}")


def vllm_over(engine: Engine, python: str) -> VllmPeer:
    """vLLM over the engine's model; over the same shape with weights of its own where ours are random."""
    dtype, most = str(engine.dtype).removeprefix("torch."), min(2048, engine.config.context)
    return VllmPeer(python, dtype, engine.device, most, engine.model.folder or engine.model.name)


def settings_of(order: dict[str, Any]) -> str:
    """What of vLLM's settings is not its default, and why."""
    others = f"no prefix caching, at most {order['max_model_len']} tokens a request"
    if not order["cpu"]:
        kv = order["kv_bytes"]
        memory = (
            f"{order['memory_share']:.0%} of the GPU's memory" if kv is None else f"{kv / 2**30:.1f} GiB of KV cache"
        )
        return f"defaults; {others}, {memory}, sampling without FlashInfer"
    how = "eager, since there is no C++ compiler here to compile it" if order["eager"] else "compiled, as by default"
    return f"{how}; in one process, which computes on every core; {others}, 1 GiB of KV cache"


def has_compiler() -> bool:
    """Whether PyTorch's compiler finds the C++ compiler that it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def _memory_share(device: str, kv_bytes: int | None) -> float:
    """Of the GPU's memory. With a KV cache of a given size vLLM uses it for one thing: so much must be free."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    share = _SHARE * free if kv_bytes is None else min(_SHARE * free, 2 * kv_bytes)
    return max(0.01, round(share / total, 3))


def _only(device: str) -> dict[str, str]:
    import torch

    from splitwiser_lab.lanes.support import only_visible

    return only_visible(torch.device(device))


def _family(pid: int) -> set[psutil.Process]:
    """A process and all that it started; nothing where it has ended."""
    try:
        first = psutil.Process(pid)
        return {first, *first.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
