"""What memory each engine gets for its KV cache, computed from what is free, with the sum that says so."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from splitwiser_lab.errors import HardwareError
from splitwiser_lab.pipelines.vllm.placement import Part, VllmPlacement
from splitwiser_lab.pipelines.vllm.source import VllmModel

_GIB = 2**30
USABLE = 0.9  # of the memory that is free, for all engines together: the paper gives each 0.9 / N
# What an engine takes beside weights and KV cache: interpreter and libraries, or CUDA context, graphs, activations.
_PROCESS_BYTES = {"cpu": 700 * 2**20, "cuda": 3 * _GIB}
_STEP_TOKENS = {"cpu": 2048, "cuda": 8192}
BLOCK_SIZE = {"cpu": 32, "cuda": 16}  # tokens: the smallest that vLLM's attention takes there
_LARGEST_BLOCK = 128  # tokens: that it may choose on a GPU
_SPARE_TOKENS = 2 * _LARGEST_BLOCK  # vLLM keeps one empty block for itself
_MOST_HAND_OFF = 2 * _GIB
_FEWEST_SLOTS, _MOST_SLOTS = 2, 64
_RAM_FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class Work:
    """What the requests of a run need: the longest (prompt and output) in tokens, and how many run at once."""

    prompt: int
    total: int
    at_once: int
    requests: int

    def joined(self, other: Work) -> Work:
        """What covers both."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Work(*(max(pair) for pair in pairs))

    def covers(self, other: Work) -> bool:
        """Whether engines made for this can do `other`."""
        return self.joined(other) == self


@dataclass(frozen=True)
class KVBudget:
    """KV cache of each engine in bytes, and slots of `slot_bytes` for what is handed over: files, or shared memory."""

    kv_bytes: tuple[int, ...]
    slots: int
    slot_bytes: int
    sum: str


def kv_budget(
    placement: VllmPlacement, model: VllmModel, device: str, work: Work, free: int, host_free: int
) -> KVBudget:
    """Divide what is left of `free` bytes after weights and processes among the engines' KV caches.

    An engine gets what its part of the requests would fill, and less when memory is short: then all get the
    same fraction of that. Raises HardwareError, with the sum, where one request would not fit into each.
    """
    kind, count = torch.device(device).type, placement.engines
    block, token = BLOCK_SIZE[kind], model.kv_token_bytes
    one = least_tokens(work, kind)
    wanted = [max(one, n * _up(work.total, block) + _SPARE_TOKENS) for n in _shares(placement, work, kind)]
    slot_bytes = _up(work.prompt, _LARGEST_BLOCK) * token if placement.mode == "split" else 0
    in_device = kind == "cpu" or placement.connector == "shared"  # files lie in the host's memory
    slots = _slots(slot_bytes, work.at_once, free if in_device else host_free) if slot_bytes else 0
    hand_off = slots * slot_bytes if in_device else 0
    usable, each = USABLE * free - hand_off, model.weight_bytes + _PROCESS_BYTES[kind]
    text = (
        f"{count} × ({_gib(model.weight_bytes)} weights + {_gib(_PROCESS_BYTES[kind])} process + {_gib(one * token)} "
        f"keys and values of one request of {work.total} tokens) + {_gib(hand_off)} hand-off = "
        f"{_gib(count * (each + one * token) + hand_off)}, and {USABLE:.0%} of the {_gib(free)} that are free are "
        f"{_gib(USABLE * free)}"
    )
    if usable < count * (each + one * token):
        most = int(max(0.0, usable) // (each + one * token))
        fewer = f"use at most {most} engines, or " if 0 < most < count else ""
        raise HardwareError(f"{text}: {fewer}a smaller model, shorter prompts or outputs.")
    more = sum(wanted) - count * one  # tokens beyond one request in each engine
    scale = min(1.0, ((usable - count * each) / token - count * one) / more) if more else 0.0
    tokens = [one + math.floor(scale * (want - one)) for want in wanted]
    return KVBudget(tuple(n // block * block * token for n in tokens), slots, slot_bytes, text)


def whole_kv_bytes(work: Work, model: VllmModel) -> int:
    """Bytes of a KV cache in which all requests of a run that may run at once fit, whatever the size of a block."""
    return (work.at_once * _up(work.total, _LARGEST_BLOCK) + _SPARE_TOKENS) * model.kv_token_bytes


def least_tokens(work: Work, kind: str) -> int:
    """Tokens of the smallest KV cache that an engine can work with: one longest request, and what vLLM keeps empty."""
    return _up(work.total, BLOCK_SIZE[kind]) + _SPARE_TOKENS


def step_tokens(longest: int, part: Part, kind: str) -> int:
    """Tokens that a step of an engine may take, where prompts stay whole and the longest request has so many.

    On a GPU it is the same for each part: with one prompt a step the host is busier than the GPU. A CPU's prefill
    engine takes one longest prompt, so that decoding begins while it goes on.
    """
    return longest if kind == "cpu" and part != "both" else max(longest, _STEP_TOKENS[kind])


def _shares(placement: VllmPlacement, work: Work, kind: str) -> list[int]:
    """Requests that each engine holds at once."""
    if placement.mode == "split":  # a prefill engine lets go of prompts after their step, and has begun the next
        decoders, in_step = placement.engines - 1, step_tokens(work.total, "prefill", kind) // work.prompt
        return [min(2 * in_step, work.at_once), *[-(-work.at_once // decoders)] * decoders]
    ends = [round(work.at_once * number / placement.engines) for number in range(placement.engines + 1)]
    return [max(1, end - start) for start, end in pairwise(ends)]


def _slots(slot_bytes: int, at_once: int, host_free: int) -> int:
    """How many prompts may lie between prefill and decode. Raises HardwareError when not even two may."""
    room = min(_MOST_HAND_OFF, host_free // 4)
    if _FEWEST_SLOTS * slot_bytes > host_free // 4:
        raise HardwareError(
            f"{_FEWEST_SLOTS} × {_gib(slot_bytes)} of shared memory for keys and values between prefill and decode are "
            f"more than a quarter of the {_gib(host_free)} that are free: use shorter prompts or a smaller model."
        )
    return max(_FEWEST_SLOTS, min(_MOST_SLOTS, at_once, room // slot_bytes))


def _up(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _gib(nbytes: float) -> str:
    return f"{nbytes / _GIB:.2f} GiB"


def folder_for(nbytes: int) -> tempfile.TemporaryDirectory[str]:
    """A folder in memory with room for this much, else one among the temporary files. Raises HardwareError."""
    for place in (_RAM_FOLDER, Path(tempfile.gettempdir())):
        if place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > nbytes:
            return tempfile.TemporaryDirectory(prefix="splitwiser-kv-", dir=place, ignore_cleanup_errors=True)
    raise HardwareError(
        f"the connector 'example' needs {nbytes / 2**20:.0f} MiB of files for keys and values, and neither "
        f"{_RAM_FOLDER} nor {tempfile.gettempdir()} has that much room: use connector='shared'."
    )
