"""How keys and values pass from a prefill engine to a decode engine: two connectors of vLLM's public interface.

`FolderConnector` is vLLM's own ExampleConnector under a stopwatch: one safetensors file for each request and
layer, whole blocks only, so that the decode engine computes the tokens of the last block again.
`SharedConnector` is ours: whole blocks go through memory that both processes map, at a place that the parent
chose, and the decode engine starts with the newest token, computing no token of the prompt again.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class Stopwatch:
    """Bytes and seconds of what was moved in a step, `save` or `load`."""

    def __init__(self) -> None:
        self._moved: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[list[float]]:
        """Time a block, which adds its bytes to element 0 of what it is given."""
        start, moved = time.monotonic(), [0.0]
        yield moved
        if moved[0]:
            total = self._moved.setdefault(what, [0.0, 0.0])
            total[0] += moved[0]
            total[1] += time.monotonic() - start

    def take(self) -> list[list[Any]]:
        """`[what, bytes, seconds]` of all since the last call."""
        moved, self._moved = self._moved, {}
        return [[what, int(nbytes), seconds] for what, (nbytes, seconds) in moved.items()]


class FolderConnector(ExampleConnector):  # type: ignore[misc]
    """vLLM's ExampleConnector, timed. A prefill engine writes and never reads: it must not skip its work."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As ExampleConnector has it; for a prompt of one token it would say less than nothing."""
        matched, later = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return max(matched or 0, 0), later

    def _found_match_for_prompt(self, prompt_token_ids: list[int], mm_hashes: list[str]) -> bool:
        if self._kv_transfer_config.kv_role == "kv_producer":
            return False
        return bool(super()._found_match_for_prompt(prompt_token_ids, mm_hashes))

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """As ExampleConnector has it; where a prompt fills its blocks exactly, it would look for one block too many."""
        new = scheduler_output.scheduled_new_reqs
        lengths = [len(r.prompt_token_ids or []) for r in new if r.req_id in self._requests_need_load]
        planned = super().build_connector_meta(scheduler_output)
        loads = [r for r in planned.requests if not r.is_store]
        for load, length in zip(loads, lengths, strict=False):  # resumed requests come after the new ones
            stored = (length - 2) // self._block_size * self._block_size
            load.token_ids, load.slot_mapping = load.token_ids[:stored], load.slot_mapping[:stored]
        return planned

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Write one layer's part of each prompt that was computed in this step."""
        stored = [r for r in self._get_connector_metadata().requests if r.is_store]
        with stopwatch("save") as moved:
            super().save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)
            moved[0] += sum(len(r.slot_mapping) for r in stored) * self._token_bytes(kv_layer)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Read all layers of each prompt that joins in this step."""
        tokens = sum(len(r.slot_mapping) for r in self._get_connector_metadata().requests if not r.is_store)
        layers = (getattr(layer, "kv_cache", None) for layer in forward_context.no_compile_layers.values())
        each = [self._token_bytes(layer) for layer in layers if layer is not None] if tokens else []
        with stopwatch("load") as moved:
            super().start_load_kv(forward_context, **kwargs)
            moved[0] += tokens * sum(each)

    def _token_bytes(self, layer: Any) -> float:
        """Bytes of one token's key and value in one layer."""
        tensor = layer[0] if isinstance(layer, list | tuple) else layer
        blocks: int = self._vllm_config.cache_config.num_gpu_blocks
        return float(tensor.numel() * tensor.element_size() / (blocks * self._block_size))


@dataclass
class Job:
    """Blocks of one request to move, and the byte of the shared memory at which its pages begin."""

    what: str
    blocks: list[int]
    offset: int


@dataclass
class Jobs(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker to move in a step."""

    jobs: list[Job] = field(default_factory=list)


class Pages:
    """The engine's KV cache, all layers, seen as whole blocks; and the memory shared with other processes."""

    def __init__(self, layers: list[torch.Tensor], blocks: int, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None
        self._layers: list[torch.Tensor] = []
        for layer in layers:
            if blocks not in layer.shape:
                raise RuntimeError(
                    f"SharedConnector cannot find {blocks} blocks in a KV cache of shape {tuple(layer.shape)}: "
                    "use the connector 'example'"
                )
            self._layers.append(layer.movedim(layer.shape.index(blocks), 0))  # [blocks, ...]
        self.page_bytes = sum(layer[0].numel() * layer.element_size() for layer in self._layers)

    def move(self, job: Job) -> int:
        """Copy a request's blocks to or from the shared memory; bytes moved."""
        index, offset = torch.tensor(job.blocks), job.offset
        for layer in self._layers:
            shape = (len(job.blocks), *layer.shape[1:])
            there = self._view(layer.dtype, shape, offset)
            if job.what == "save":
                there.copy_(layer[index.to(layer.device)])
            else:
                layer[index.to(layer.device)] = there.to(layer.device)
            offset += there.numel() * there.element_size()
        return offset - job.offset

    def _view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        size = os.fstat(self._fd).st_size
        if self._map is None or len(self._map) < size:  # the parent has made room
            self._map = mmap.mmap(self._fd, size)
        count = 1
        for length in shape:
            count *= length
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)


class SharedConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Moves the blocks of a prompt through shared memory, at once and within the engine's step."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._blocks = int(kv_cache_config.num_blocks)
        self._fd = int(self._kv_transfer_config.get_from_extra_config("fd", -1))
        self._loaded: set[str] = set()
        self._planned: list[Job] = []

    # -- in the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """All tokens of the prompt that lie in shared memory. A preempted request finds none and is computed anew."""
        transfer = request.kv_transfer_params or {}
        if transfer.get("what") != "load" or request.request_id in self._loaded:
            return 0, False
        return int(transfer["tokens"]) - num_computed_tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the move of a request that has its blocks now."""
        transfer = request.kv_transfer_params or {}
        what = transfer.get("what")
        if what == "load" and num_external_tokens > 0:
            self._loaded.add(request.request_id)
        elif what != "save":
            return
        count = -(-int(transfer["tokens"]) // self._vllm_config.cache_config.block_size)
        own = list(blocks.get_block_ids()[0])[:count]
        self._planned.append(Job(what, own, int(transfer["offset"])))

    def build_connector_meta(self, scheduler_output: Any) -> Jobs:
        """Hand the plan of this step to the worker."""
        jobs, self._planned = Jobs(self._planned), []
        return jobs

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed: they were copied within a step."""
        self._loaded.discard(request.request_id)
        return False, None

    # -- in the worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """See the engine's KV cache, once it has one."""
        global pages
        layers = [layer[0] if isinstance(layer, list | tuple) else layer for layer in kv_caches.values()]
        pages = Pages(layers, self._blocks, self._fd)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy what joins in this step, before any layer reads it."""
        self._do("load")

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All was loaded at the start."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All is saved at the end."""

    def wait_for_save(self) -> None:
        """Copy what was computed in this step, after its last layer."""
        self._do("save")

    def _do(self, what: str) -> None:
        jobs = [job for job in self._get_connector_metadata().jobs if job.what == what]
        if pages is None:  # before there is a cache there is nothing to move
            return
        with stopwatch(what) as moved:
            for job in jobs:
                moved[0] += pages.move(job)


stopwatch = Stopwatch()
pages: Pages | None = None
