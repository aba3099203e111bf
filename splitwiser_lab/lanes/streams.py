"""CUDA streams, and what else is dear to make, used again when their owner is gone.

PyTorch keeps a workspace for each stream that ever ran a matrix product, and a CUDA graph keeps the SMs
of the stream it was captured on. So streams are never destroyed: engines that come and go would leave
memory behind with each.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Kept = TypeVar("Kept")
_idle: defaultdict[Hashable, list[Any]] = defaultdict(list)
_lock = threading.Lock()


def borrow(owner: object, key: Hashable, make: Callable[[], Kept]) -> Kept:
    """Something that nobody else uses now: an idle one kept under `key`, else a new one from `make`.

    It is idle again once `owner` no longer exists.
    """
    with _lock:
        found: Kept | None = _idle[key].pop() if _idle[key] else None
    kept = make() if found is None else found
    weakref.finalize(owner, give_back, key, kept)
    return kept


def give_back(key: Hashable, kept: object) -> None:
    """Keep something for the next who asks for `key`."""
    with _lock:
        _idle[key].append(kept)


def stream_of(owner: object, device: torch.device, high_priority: bool = False) -> torch.cuda.Stream:
    """A stream for one lane of `owner`; work of high priority gets freed SMs first."""
    priority = -1 if high_priority else 0
    return borrow(owner, ("stream", device, priority), lambda: torch.cuda.Stream(device, priority=priority))
