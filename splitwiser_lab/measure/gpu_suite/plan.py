"""What the suite measures: sizes for a GPU, and small ones with which every section runs on a CPU in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from splitwiser_lab.measure.overlap import Shape

SectionName = Literal["efficiency", "overlap", "sweep", "peers", "kernels", "hostbound"]
SECTIONS: tuple[SectionName, ...] = get_args(SectionName)
# How the time is divided: a section gets its part of what is left when it begins.
WEIGHTS: dict[SectionName, float] = {
    "efficiency": 1, "overlap": 3, "sweep": 6, "peers": 3, "kernels": 1, "hostbound": 3
}  # fmt: skip
DEFAULT_SHAPES = ("llama-3.2-1b-shape", "llama-3.1-8b-shape")
HOST_BOUND_SHAPE = "opt-125m-shape"


@dataclass(frozen=True)
class ChatLimits:
    """What a chat needs to feel immediate, per request: first token, and the 99th percentile of its token gaps.

    The defaults are our own choice; goodput under other limits of the gap stands beside it in the results.
    """

    ttft_ms: float = 500.0
    itl_ms: float = 30.0


@dataclass(frozen=True)
class Plan:
    """Sizes of one run of the suite. `overlaps` are the loads of the gain map, largest last."""

    prefill_tokens: int
    overlaps: tuple[Shape, ...]
    overlap_seconds: float
    splits: tuple[float, ...]  # part of the SMs that decode gets
    kv_tokens: int
    sweep_scale: float  # of the trace's lengths
    sweep_seconds: float  # of arrivals in one run
    sweep_fractions: tuple[float, ...]  # of the sequential capacity
    capacity_requests: int
    peer_requests: int
    peer_prompt: int
    peer_output: int
    host_batch: int
    host_prompt: int
    host_outputs: tuple[int, ...]
    host_processes: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...] = ((32, 1024), (128, 2048))  # batch, context
    chunks: tuple[int, ...] = ()  # of mixed batches in the gain map, beside the default


FULL = Plan(
    prefill_tokens=2048,
    overlaps=(Shape(2048, 32, 1024), Shape(2048, 128, 1024)),
    overlap_seconds=0.6,
    splits=(0.25, 0.375, 0.5, 0.625),
    kv_tokens=300_000,
    sweep_scale=1.0,
    sweep_seconds=5.0,
    sweep_fractions=(0.7, 1.0, 0.85, 1.15, 0.5),  # if time runs out, the last are missing
    capacity_requests=200,
    peer_requests=128,
    peer_prompt=1024,
    peer_output=128,
    host_batch=20,
    host_prompt=1024,
    host_outputs=(12, 128),
    host_processes=(1, 2, 4),
    chunks=(256, 1024, 2048),
)
SMALL = Plan(
    prefill_tokens=64,
    overlaps=(Shape(64, 2, 32),),
    overlap_seconds=0.2,
    splits=(0.5,),
    kv_tokens=8192,
    sweep_scale=0.02,
    sweep_seconds=0.5,
    sweep_fractions=(0.7, 1.1),
    capacity_requests=8,
    peer_requests=3,
    peer_prompt=16,
    peer_output=4,
    host_batch=2,
    host_prompt=16,
    host_outputs=(4,),
    host_processes=(1, 2),
    decodes=((4, 32),),
)
