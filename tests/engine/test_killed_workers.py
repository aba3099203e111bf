"""A worker process dies: its batch fails by name, the others finish, the next call works, nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny_models import expected, prompts_of, tiny

from splitwiser_lab import Engine, GenerationError, LaneError
from splitwiser_lab.engine.request import Request
from splitwiser_lab.lanes.process import ProcessLane

pytestmark = pytest.mark.timeout(120)
PROMPTS = prompts_of(40, 12, 25, 60, 33, 20)
NEW = 40


@pytest.fixture(scope="module")
def split() -> Iterator[Engine]:
    """An engine whose workers may be killed; the mode stays `processes`."""
    with Engine.from_pretrained(tiny("llama"), mode="processes", kv_tokens=4096, page_size=8) as engine:
        yield engine


def lane_of(engine: Engine, name: str) -> ProcessLane:
    lane = engine._house.lane("process", name, {})
    assert isinstance(lane, ProcessLane)
    return lane


def kill(engine: Engine, name: str) -> int:
    pid = lane_of(engine, name).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def await_end(engine: Engine, name: str) -> None:
    """Return when the killed process computes no more, with none of its threads."""
    child = lane_of(engine, name)._child
    assert child is not None
    child._process.wait(10)


def check_failure(error: GenerationError, name: str, pid: int) -> None:
    """The message names lane, process and signal; each request is either right or failed for this reason."""
    message = str(error)
    assert f"lane '{name}'" in message and f"pid {pid}" in message and "SIGKILL" in message
    result, wanted = error.result, expected("llama", PROMPTS, NEW)
    failed = [request for request in result.requests if request.finish_reason == "error"]
    assert failed
    for request, tokens in zip(result.requests, wanted, strict=True):
        if request in failed:
            assert isinstance(request.error, LaneError)
            assert request.output == tokens[: len(request.output)]
        else:
            assert request.finish_reason == "length" and request.output == tokens
    assert result.metrics.errors == len(failed)
    assert f"{len(failed)} of {len(PROMPTS)} requests failed" in message


def check_recovered(engine: Engine, name: str, old_pid: int) -> None:
    assert engine.kv_use == 0
    assert engine.mode == "processes"
    assert engine.generate(PROMPTS, NEW).tokens == expected("llama", PROMPTS, NEW)
    assert lane_of(engine, name).pid not in (None, old_pid)
    assert not psutil.pid_exists(old_pid), "the dead worker was not reaped"


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_killed_between_two_batches(split: Engine, name: str) -> None:
    """The lane is idle at that moment, so nothing is lost: its next batch goes to a new process."""
    split.set_mode("processes", max_batch=2)
    pids: list[int] = []

    def listen(request: Request, token: int) -> None:
        # A first token comes from the prefill lane, any other from the decode lane: that lane is idle now.
        if not pids and len(request.output) == (1 if name == "prefill" else 5):
            pids.append(kill(split, name))
            await_end(split, name)

    assert split.generate(PROMPTS, NEW, on_token=listen).tokens == expected("llama", PROMPTS, NEW)
    check_recovered(split, name, pids[0])


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_killed_in_the_middle_of_a_batch(split: Engine, name: str) -> None:
    """Stopped first, so that a batch is surely under way in it when it dies."""
    split.set_mode("processes", max_batch=3, prefill_tokens=1)
    pid, threads = lane_of(split, name).pid, []
    assert pid is not None

    def kill_later() -> None:
        time.sleep(0.3)
        kill(split, name)

    def listen(request: Request, token: int) -> None:
        if not threads and len(request.output) == (1 if name == "prefill" else 5):
            os.kill(pid, signal.SIGSTOP)
            threads.append(threading.Thread(target=kill_later))
            threads[0].start()

    with pytest.raises(GenerationError) as caught:
        split.generate(PROMPTS, NEW, on_token=listen)
    threads[0].join()
    check_failure(caught.value, name, pid)
    assert any(request.completed for request in caught.value.result.timeline.requests)
    check_recovered(split, name, pid)


@pytest.mark.parametrize("names", [("decode",), ("prefill",), ("prefill", "decode")])
def test_killed_between_two_calls(split: Engine, names: tuple[str, ...]) -> None:
    """The next call does not notice."""
    split.set_mode("processes")
    split.generate(PROMPTS[:2], 3)
    pids = [kill(split, name) for name in names]
    for name in names:
        await_end(split, name)
    for name, pid in zip(names, pids, strict=True):
        check_recovered(split, name, pid)


def test_killed_workers_do_not_disturb_the_other_modes(split: Engine) -> None:
    for name in ("prefill", "decode"):
        kill(split, name)
        await_end(split, name)
    split.set_mode("chunked")
    assert split.generate(PROMPTS, NEW).tokens == expected("llama", PROMPTS, NEW)
    split.set_mode("processes")
    assert split.generate(PROMPTS, NEW).tokens == expected("llama", PROMPTS, NEW)


def shared_memory() -> tuple[int, list[str], list[str]]:
    """Our anonymous files this process holds open, those it maps, and the named ones of the machine."""
    fds = [link for fd in Path("/proc/self/fd").iterdir() if "splitwiser" in (link := _target(fd))]
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "splitwiser" in line]
    named = sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []
    return len(fds), maps, named


def _target(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:
        return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux shows what a process holds")
@pytest.mark.parametrize("ending", ["close", "kill, then close", "drop"])
def test_nothing_is_left(ending: str, no_process_left: None) -> None:
    gc.collect()
    before = shared_memory()
    engine = Engine.from_pretrained(tiny("llama"), mode="processes", kv_tokens=4096, page_size=8)
    assert engine.generate(PROMPTS[:2], 3).tokens == expected("llama", PROMPTS[:2], 3)
    during = shared_memory()
    assert during[0] > before[0] and len(during[1]) > len(before[1])
    pool = weakref.ref(engine.pool)
    if "kill" in ending:
        kill(engine, "decode")
        kill(engine, "prefill")
    if "close" in ending:
        engine.close()  # and `engine` is still held: close() itself must give the memory back
    else:
        workers = [psutil.Process(lane_of(engine, name).pid) for name in ("prefill", "decode")]
        del engine
        gc.collect()
        psutil.wait_procs(workers, timeout=5)  # they end by themselves, and are reaped here
    gc.collect()
    assert pool() is None
    assert shared_memory() == before


def test_close_while_a_worker_hangs(no_process_left: None) -> None:
    engine = Engine.from_pretrained(tiny("llama"), mode="processes", kv_tokens=4096)
    pid = lane_of(engine, "decode").pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 15
    assert not psutil.pid_exists(pid)
