"""Whether N processes fit into memory, with the sum that says so, and what they took in the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from splitwiser_lab.errors import HardwareError
from splitwiser_lab.hardware import free_memory_bytes
from splitwiser_lab.pipelines.kv import KVLayout
from splitwiser_lab.pipelines.team import SLOTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_GIB = 2**30
# What a process takes before its first batch, weights aside: interpreter and libraries, or a CUDA context.
_PROCESS_BYTES = {"cpu": 350 * 2**20, "cuda": 600 * 2**20}
_ACTIVATIONS = 16  # of a layer, in units of the hidden size: input, norm, query, key, value, output, two of the MLP


@dataclass(frozen=True)
class MemoryNeed:
    """What a placement will take on its device beyond the weights, in bytes."""

    processes: int
    process: int
    cache: int
    activations: int
    slots: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.processes * (self.process + self.cache + self.activations) + self.slots

    def check(self, free: int) -> None:
        """Raise HardwareError with the sum when it is more than `free` bytes."""
        if self.total <= free:
            return
        each = self.process + self.cache + self.activations
        most = max(0, (free - self.slots) // each)
        fewer = f"use at most {most} processes, or " if 0 < most < self.processes else ""
        raise HardwareError(
            f"{self.processes} × ({_gib(self.process)} process + {_gib(self.cache)} keys and values + "
            f"{_gib(self.activations)} activations) + {_gib(self.slots)} hand-off = {_gib(self.total)}, and "
            f"{_gib(free)} are free beside the weights: {fewer}a smaller batch, shorter prompts or outputs."
        )


def need(
    processes: int,
    split: bool,
    layout: KVLayout,
    config: PreTrainedConfig,
    device: str,
    rows: int,
    lengths: tuple[int, int],
) -> MemoryNeed:
    """An estimate for batches of `rows` and the longest (prompt, prompt and output) in tokens."""
    prompt, total = lengths
    tokens = rows * prompt
    hidden = config.get_text_config(decoder=True).hidden_size
    return MemoryNeed(
        processes,
        _PROCESS_BYTES[torch.device(device).type],
        layout.nbytes(rows, total),
        tokens * hidden * _ACTIVATIONS * layout.dtype.itemsize,
        SLOTS * layout.nbytes(rows, prompt) if split else 0,
    )


def settled_free_bytes(device: str) -> int:
    """What is free on `device` once this process has given back what it only keeps for later."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return free_memory_bytes(device)


def private_bytes(pids: Iterable[int], device: str, free_before: int) -> int | None:
    """What started processes hold beside the shared weights, after their first batches. None where it is not told.

    On a CPU, what is theirs alone; on a GPU, what is gone of the `free_before` bytes, hand-off slots included.
    """
    if torch.device(device).type == "cuda":
        return max(0, free_before - free_memory_bytes(device))
    try:
        return sum(int(psutil.Process(pid).memory_full_info().uss) for pid in pids)
    except psutil.Error:
        return None


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB"
