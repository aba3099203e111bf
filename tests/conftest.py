"""What the tests share: engines over tiny random models, and a check that they leave no process behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from tiny_models import tiny

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.loading import load

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much on a busy machine
PAGE = 8


class ByteTokenizer:
    """Enough of a tokenizer for the engine: ids are characters, pairs of them, and the bytes of an emoji.

    Tokens of several characters and characters of several tokens are what streaming and stop texts must get right.
    """

    def __init__(self) -> None:
        letters = [bytes([b]) for b in range(32, 127)]  # ids 0 to 94
        pairs = [a.encode() + b.encode() for a in "aeiouxyz" for b in "bcdfg, ."]  # 95 to 158
        self.pieces = letters + pairs + [bytes([b]) for b in "🙂".encode()] * 10  # 159 to 198

    def __call__(self, text: str) -> Any:
        return type("Encoded", (), {"input_ids": [byte - 32 for byte in text.encode()]})

    def byte_ids(self, text: str) -> list[int]:
        """One token a byte, the emoji in four."""
        return [self.pieces.index(bytes([byte])) for byte in text.encode()]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def speaking_engine() -> Engine:
    """A llama engine with a ByteTokenizer."""
    loaded = replace(load(tiny("llama"), "cpu", torch.float32), tokenizer=ByteTokenizer())
    return Engine(loaded, KVPool(loaded.config, torch.float32, "cpu", 512, PAGE))


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """A function that makes engines of tiny models: `make_engine("llama", "chunked", kv_tokens=..., ...)`.

    They are closed after the test.
    """
    made: list[Engine] = []

    def make(family: str = "llama", mode: str = "sequential", **options: Any) -> Engine:
        settings = {"kv_tokens": 4096, "page_size": PAGE, **options}
        made.append(Engine.from_pretrained(tiny(family), mode=mode, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def _shared_engine() -> Iterator[Engine]:
    with Engine.from_pretrained(tiny("llama"), kv_tokens=4096, page_size=PAGE) as engine:
        yield engine


@pytest.fixture
def engine(_shared_engine: Engine) -> Iterator[Engine]:
    """One llama engine for all tests that only use it: its processes start once. Choose the mode with `set_mode`."""
    _shared_engine.set_mode("sequential")
    yield _shared_engine
    assert _shared_engine.kv_use == 0, "the test left requests in the engine"


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """Fails when a child process that was not there before is still there a few seconds later."""
    before = set(children())
    yield
    deadline = time.monotonic() + 5
    while (left := set(children()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"left behind: {left}"


def children() -> list[psutil.Process]:
    """All descendants of this process, zombies included."""
    return psutil.Process().children(recursive=True)
