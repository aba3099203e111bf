"""Stands in for vLLM's Python: speaks the protocol of run_engine.py and invents tokens that follow from the text.

What it does wrong is told by FAKE_VLLM in its environment: `version 0.11.0`, `no vllm`, `no room`, `no connector`,
`die PART N` (a kill at step N of an engine with that part), `slow` (0.2 s a step), `deaf` (starts for ever),
`refuse` (its part of the GPU multiplies wrongly), `core` (it has a child that outlives it), `core fails`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

VOCAB = 199
KV_BYTES_PER_BLOCK = 4096


def next_token(tokens: list[int]) -> int:
    """Depends on every token before it."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 100_003
    return value % VOCAB


def continued(prompt: list[int], count: int) -> list[int]:
    """What an engine writes after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Engine:
    """One token for each request and step; a prompt takes a step of its own."""

    def __init__(self, line: Connection, settings: dict, fault: str) -> None:
        self.line, self.fault = line, fault.split()
        role = (settings["kv_transfer"] or {}).get("kv_role")
        self.part = {"kv_producer": "prefill", "kv_consumer": "decode"}.get(role, "both")
        self.running: dict[str, dict] = {}
        self.steps, self.moved = 0, []

    def add(self, request: dict) -> None:
        loaded = (request["transfer"] or {}).get("what") == "load"
        now = time.monotonic()
        self.running[request["id"]] = {
            **request, "known": list(request["prompt"]), "left": request["new_tokens"], "queued": now, "first": None,
            "cached": request["transfer"]["tokens"] if loaded else 0, "scheduled": None,
        }  # fmt: skip

    def step(self) -> None:
        if self.fault[:2] == ["die", self.part] and self.steps == int(self.fault[2]):
            print("the fake engine was told to die", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        start, tokens, finished = time.monotonic(), [], []
        time.sleep(0.2 if self.fault == ["slow"] else 0.001)
        for name, request in list(self.running.items()):
            now = time.monotonic()
            if request["first"] is None:
                request["scheduled"], request["first"] = start, now
                if request["transfer"]:
                    what, count = request["transfer"]["what"], request["transfer"]["tokens"]
                    self.moved.append([what, 1000 * -(-count // 32), 0.001, name])
            token = next_token(request["known"])
            request["known"].append(token)
            request["left"] -= 1
            tokens.append([name, [token]])
            if token in request["stop"] or not request["left"]:
                del self.running[name]
                times = {key: request[key] for key in ("queued", "scheduled", "first", "cached")}
                reason = "stop" if token in request["stop"] else "length"
                finished.append({"id": name, "reason": reason, **times, "last": now, "preemptions": 0})
        self.steps += 1
        say(self.line, kind="step", start=start, end=time.monotonic(), tokens=tokens, finished=finished)

    def tell_moved(self) -> None:
        say(self.line, kind="step", start=time.monotonic(), end=time.monotonic(), tokens=[], finished=[])  # a last one
        say(self.line, kind="moved", moved=self.moved)
        self.moved = []


def say(line: Connection, **message: object) -> None:
    line.send_bytes(json.dumps(message).encode())


def end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(75)


def main(fd: int, *lifeline: int) -> None:
    for end in lifeline:
        threading.Thread(target=end_with, args=(end,), daemon=True).start()
    fault = os.environ.get("FAKE_VLLM", "")
    line = Connection(fd)
    if fault == "no vllm":
        say(line, kind="failure", error="ModuleNotFoundError: this Python has no vllm", text="")
        time.sleep(60)
    said: SimpleQueue = SimpleQueue()

    def listen() -> None:
        try:
            while True:
                said.put(json.loads(line.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    if fault == "deaf":
        time.sleep(60)
    say(line, kind="version", version=fault.split()[1] if fault.startswith("version") else "0.32.0", python="3.11")
    settings = said.get()
    if fault == "refuse" and settings["products"]:
        say(line, kind="refused", error=f"under MPS with {settings['products']['share']} %, products come out wrong")
        time.sleep(60)
    if fault == "core":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if fault == "core fails":
        print("(EngineCore pid=7) ERROR ValueError: no room for 5 blocks", flush=True)
        say(
            line,
            kind="failure",
            error="RuntimeError: Engine core initialization failed. See root cause above.",
            text="",
        )
        time.sleep(60)
    if fault == "no room":
        say(line, kind="failure", error="ValueError: no room for the KV cache", text="Traceback: ...")
        time.sleep(60)
    if fault == "no connector" and settings["kv_transfer"]:
        say(line, kind="failure", error="ImportError: cannot import name 'ExampleConnector'", text="Traceback: ...")
        time.sleep(60)
    block = settings["engine_args"].get("block_size", 16)
    blocks = settings["engine_args"]["kv_cache_memory_bytes"] // KV_BYTES_PER_BLOCK
    say(line, kind="ready", kv_blocks=blocks, block_size=block, page_bytes=KV_BYTES_PER_BLOCK)
    engine = Engine(line, settings, fault)
    while True:
        try:
            while True:
                message = said.get(block=not engine.running)
                if "requests" not in message:
                    engine.tell_moved()
                for request in message.get("requests", ()):
                    engine.add(request)
        except Empty:
            pass
        engine.step()


if __name__ == "__main__":
    main(*map(int, sys.argv[2:]))  # argv[1] is the program that a real Python would run
