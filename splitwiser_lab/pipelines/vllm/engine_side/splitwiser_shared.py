"""A connector of ours: keys and values pass through memory that the prefill and the decode engine both map.

Whole blocks are copied, at a place that the parent chose, and the decode engine starts with the newest token: it
computes no token of the prompt again. On a GPU that memory is the GPU's own, and nothing passes through the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from splitwiser_memory import Memory, memory_of
from splitwiser_pages import Job, Pages
from splitwiser_stopwatch import stopwatch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)


@dataclass
class Jobs(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker to move in a step."""

    jobs: list[Job] = field(default_factory=list)


class SharedConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Moves the blocks of a prompt through shared memory, within the engine's step.

    A GPU copies in the order of its stream, so that loads are there before any layer reads them, and saves before the
    host knows a prompt's first token, which is what sends it to the decode engine.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._blocks = int(kv_cache_config.num_blocks)
        self._described = dict(self._kv_transfer_config.get_from_extra_config("memory", {}))
        self._memory: Memory | None = None
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
        self._planned.append(Job(transfer["request"], what, own, int(transfer["offset"])))

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
        pages = Pages(layers, self._blocks)
        self._memory = memory_of(self._described)

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
        if pages is None or self._memory is None:  # before there is a cache there is nothing to move
            return
        for job in jobs:
            with stopwatch(what, self._memory.on_gpu) as moved:
                moved[job.request] = pages.move(job, self._memory)


pages: Pages | None = None  # of this process's engine, which tells the parent how large they are
