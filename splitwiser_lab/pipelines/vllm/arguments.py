"""What vLLM is told of an engine: equal in every mode but for what the mode is."""

from __future__ import annotations

from typing import Any

import torch

from splitwiser_lab.pipelines.vllm.memory import BLOCK_SIZE, Work, least_tokens, step_tokens
from splitwiser_lab.pipelines.vllm.placement import EngineRole, VllmPlacement
from splitwiser_lab.pipelines.vllm.settings import EngineSettings
from splitwiser_lab.pipelines.vllm.source import VllmModel

Kind = tuple[object, ...]
_GRAPH_STEP, _SMALL_GRAPHS = 8, (1, 2, 4)  # tokens between two batch sizes that vLLM captures, and those below
_MOST_CAPTURED = 512  # tokens: vLLM's own limit by default


def engine_arguments(
    model: VllmModel,
    placement: VllmPlacement,
    role: EngineRole,
    work: Work,
    settings: EngineSettings,
    device: torch.device,
    kv_bytes: int,
) -> dict[str, Any]:
    """The fields of vLLM's EngineArgs for one engine with `kv_bytes` of KV cache."""
    kind, most, chunk = device.type, work.total, placement.chunk_tokens
    sequences = settings.at_once(max(2, min(work.at_once, chunk or work.at_once)))  # a step has a token for each
    given: dict[str, Any] = {
        "model": model.folder.name,  # the engine's working folder is the one around it
        "dtype": model.dtype,
        "max_model_len": most,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": chunk or max(sequences, step_tokens(most, role.part, kind)),
        "enable_chunked_prefill": chunk is not None,
        "enable_prefix_caching": False,
        "enforce_eager": settings.eager or kind == "cpu",
        "kv_cache_memory_bytes": kv_bytes,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",
        "disable_log_stats": False,  # else there are no request metrics
    }
    if model.random_weights:
        given["load_format"] = "dummy"
    if placement.mode == "split":
        given["disable_hybrid_kv_cache_manager"] = True
    given["block_size"] = BLOCK_SIZE[kind]
    if kind == "cpu":
        return given
    if not given["enforce_eager"]:
        given["max_cudagraph_capture_size"] = _largest_graph(max(sequences, min(chunk or 0, _MOST_CAPTURED)))
    total = torch.cuda.get_device_properties(device).total_memory
    given["gpu_memory_utilization"] = round(min(0.9, (kv_bytes + model.weight_bytes) / total + 0.02), 3)
    # vLLM compiles anew for each number of bytes, though nothing that it compiles depends on them, but not for each
    # number of blocks: so the bytes are those of the smallest cache, and the blocks say how large this one is.
    block = BLOCK_SIZE[kind] * model.kv_token_bytes
    smallest = least_tokens(work, kind) * model.kv_token_bytes
    return given | {"kv_cache_memory_bytes": smallest, "num_gpu_blocks_override": kv_bytes // block}


def _largest_graph(tokens: int) -> int:
    """Tokens of the largest step that is captured: every decode step of a full batch or every chunk, and no more.

    vLLM would capture more by itself; but a step with a whole prompt in it is longer still, and is not captured
    either way, so that half of the captures, and their seconds at each start, serve nothing here.
    """
    return next((size for size in _SMALL_GRAPHS if size >= tokens), -(-tokens // _GRAPH_STEP) * _GRAPH_STEP)


def kind_of(arguments: dict[str, Any], placement: VllmPlacement) -> Kind:
    """What vLLM compiles for: engines of one kind share the result, which it keeps."""
    shape = ("model", "dtype", "max_model_len", "max_num_batched_tokens", "max_cudagraph_capture_size")
    return (*(arguments.get(name) for name in shape), placement.connector is None)
