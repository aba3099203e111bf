"""What passes between two vLLM engines: blocks in every layout, the memory that holds them, and the time it took."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitwiser_lab.pipelines.vllm import team
from splitwiser_lab.shared_memory import allocate


@pytest.fixture
def engine_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that vLLM's own Python finds beside the program it runs."""
    monkeypatch.syspath_prepend(str(Path(team.__file__).parent / "engine_side"))


@pytest.mark.parametrize(
    "shape",
    [(9, 2, 16, 3, 8), (2, 9, 16, 3, 8), (9, 3, 16, 16)],
    ids=["GPU", "GPU, older", "CPU"],
)
def test_blocks_arrive_as_they_were_in_every_layout(engine_side: None, shape: tuple[int, ...]) -> None:
    from splitwiser_memory import memory_of
    from splitwiser_pages import Job, Pages

    blocks = shape.index(9)
    ours, theirs = ([torch.randn(shape).to(torch.bfloat16) for _ in range(2)] for _ in range(2))
    untouched = [layer.clone() for layer in theirs]
    prefill, decode = Pages(ours, 9), Pages(theirs, 9)
    assert prefill.page_bytes == 2 * 2 * ours[0].numel() // 9
    buffer = allocate(4 * prefill.page_bytes, "cpu")
    memory = memory_of({"fd": buffer.export()})
    moved = prefill.move(Job("a", "save", [7, 2, 5], prefill.page_bytes), memory)
    assert moved == decode.move(Job("a", "load", [1, 8, 3], prefill.page_bytes), memory) == 3 * prefill.page_bytes
    for mine, other, before in zip(ours, theirs, untouched, strict=True):
        sent, got = mine.movedim(blocks, 0), other.movedim(blocks, 0)
        assert torch.equal(sent[[7, 2, 5]], got[[1, 8, 3]])
        kept = [0, 2, 4, 5, 6, 7]
        assert torch.equal(got[kept], before.movedim(blocks, 0)[kept]), "no other block is touched"


def test_a_cache_of_another_kind_is_refused(engine_side: None) -> None:
    from splitwiser_pages import Pages

    with pytest.raises(RuntimeError, match=r"cannot find 10 blocks .* \(9, 2, 16\): use the connector 'example'"):
        Pages([torch.zeros(9, 2, 16)], 10)


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA IPC is Linux's")
def test_a_gpus_memory_is_opened_by_the_handle_as_it_came(engine_side: None) -> None:
    import ctypes

    from splitwiser_memory import open_handle

    given = bytes(range(64))  # with zeros in it, which no text has
    seen: list[bytes] = []

    def opened(address: Any, handle: Any, flags: Any) -> int:
        seen.append(ctypes.string_at(ctypes.addressof(handle), 64))
        address._obj.value = 0x7F00_0000_0000
        return 0

    assert open_handle(given, SimpleNamespace(cuIpcOpenMemHandle_v2=opened)) == 0x7F00_0000_0000 and seen == [given]
    with pytest.raises(RuntimeError, match=r"CUDA error 201: .* use the connector 'example'"):
        open_handle(given, SimpleNamespace(cuIpcOpenMemHandle_v2=lambda *_: 201))


def test_the_stopwatch_knows_who_moved_what(engine_side: None) -> None:
    from splitwiser_stopwatch import Stopwatch

    watch = Stopwatch()
    for _ in range(2):  # as layer by layer
        with watch("save") as moved:
            moved.update({"3": 30.0, "4": 10.0})
    with watch("load") as moved:
        moved["3"] = 5.0
    with watch("load"):
        pass
    (save, nbytes, seconds, who), load, other = watch.take()
    assert (save, nbytes, who, *load[:2], load[3]) == ("save", 60, "3", "load", 5, "3") and seconds > 0
    assert (*other[:2], other[3]) == ("save", 20, "4") and not watch.take(), "what was taken is gone"


def test_what_a_gpu_moves_is_waited_for_when_it_is_told(engine_side: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitwiser_stopwatch import Stopwatch

    events: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("record")

        def synchronize(self) -> None:
            events.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 250.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch()
    with watch("save", on_gpu=True) as moved:
        moved["7"] = 100.0
    assert events == ["record", "record"], "the host goes on"
    assert watch.take() == [["save", 100, 0.25, "7"]] and events[2:] == ["wait"]
