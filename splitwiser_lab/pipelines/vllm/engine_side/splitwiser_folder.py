"""vLLM's own ExampleConnector under a stopwatch: one safetensors file for each request and layer.

It hands over whole blocks without the last one, so that the decode engine computes a prompt's last tokens again.
"""

from __future__ import annotations

from typing import Any

import torch
from splitwiser_stopwatch import stopwatch
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


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
        loading = [request for request in new if request.req_id in self._requests_need_load]
        saving = [request for request in new if request.req_id not in self._requests_need_load]
        planned = super().build_connector_meta(scheduler_output)
        loads = [r for r in planned.requests if not r.is_store]
        for load, request in zip(loads, loading, strict=False):  # resumed requests come after the new ones
            stored = (len(request.prompt_token_ids or []) - 2) // self._block_size * self._block_size
            load.token_ids, load.slot_mapping = load.token_ids[:stored], load.slot_mapping[:stored]
        for each, request in (*zip(loads, loading, strict=False), *zip(self._stores(planned), saving, strict=False)):
            each.request = _name(request)
        return planned

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Write one layer's part of each prompt that was computed in this step."""
        token = self._token_bytes(kv_layer)
        with stopwatch("save") as moved:
            super().save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)
            stores = self._stores(self._get_connector_metadata())
            moved.update({r.request: len(r.slot_mapping) * token for r in stores if hasattr(r, "request")})

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Read all layers of each prompt that joins in this step."""
        loads = [r for r in self._get_connector_metadata().requests if not r.is_store]
        layers = (getattr(layer, "kv_cache", None) for layer in forward_context.no_compile_layers.values())
        token = sum(self._token_bytes(layer) for layer in layers if layer is not None) if loads else 0.0
        with stopwatch("load") as moved:
            super().start_load_kv(forward_context, **kwargs)
            moved.update({r.request: len(r.slot_mapping) * token for r in loads if hasattr(r, "request")})

    def _stores(self, planned: Any) -> list[Any]:
        return [request for request in planned.requests if request.is_store]

    def _token_bytes(self, layer: Any) -> float:
        """Bytes of one token's key and value in one layer."""
        tensor = layer[0] if isinstance(layer, list | tuple) else layer
        blocks: int = self._vllm_config.cache_config.num_gpu_blocks
        return float(tensor.numel() * tensor.element_size() / (blocks * self._block_size))


def _name(request: Any) -> str:
    """The parent's name for a request that the scheduler speaks of."""
    return str(request.sampling_params.extra_args["kv_transfer_params"]["request"])
