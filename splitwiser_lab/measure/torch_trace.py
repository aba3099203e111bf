"""A trace of every kernel, by PyTorch's own profiler, in the format that Perfetto (ui.perfetto.dev) opens.

`chrome_trace` draws what the lanes did; this shows what happened inside their batches. A profiler that lacks the
rights, or that looks at the wrong process, writes a trace all the same: so the trace is read back and checked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from splitwiser_lab.engine.engine import Engine

# What does the arithmetic, by the names it has in a trace: without one of these, the model's work is not in it.
_PRODUCTS = ("gemm", "matmul", "linear", "::mm", "::addmm", "cutlass", "cublas", "nvjet")


@dataclass(frozen=True, slots=True)
class KernelTrace:
    """Where the trace lies, how often each kernel was recorded, and whether the model's work is in it."""

    path: Path
    kernels: dict[str, int]
    complete: bool
    verdict: str


def trace_kernels(
    engine: Engine, prompts: Sequence[int] | Sequence[Sequence[int]], path: str | Path, new_tokens: int = 4
) -> KernelTrace:
    """Generate once to warm up and once under the profiler, write the trace to `path` (.json), and check it.

    The verdict says in words whether the kernels are in it and, if not, why that may be and what to do.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.device(engine.device).type == "cuda"
    path = Path(path)
    engine.generate(prompts, new_tokens, ignore_eos=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        engine.generate(prompts, new_tokens, ignore_eos=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return check_trace(path, on_gpu, engine.mode)


def check_trace(path: Path, on_gpu: bool, mode: str) -> KernelTrace:
    """Read a trace back and see whether it holds kernels (on a GPU) or operators (on a CPU) that multiply matrices."""
    events = json.loads(path.read_text(encoding="utf-8")).get("traceEvents", [])
    wanted = "kernel" if on_gpu else "cpu_op"
    kernels = Counter(event["name"] for event in events if event.get("cat") == wanted)
    products = sum(count for name, count in kernels.items() if any(part in name.lower() for part in _PRODUCTS))
    what = "GPU kernels" if on_gpu else "operators"
    if products:
        verdict = f"The trace holds {kernels.total():,} {what}, {products:,} of them products of matrices."
        return KernelTrace(path, dict(kernels), True, verdict)
    reasons = [f"mode {mode!r} may run its batches in other processes: trace mode 'sequential'"]
    if on_gpu:
        reasons.append("the driver may keep its counters from ordinary users: ask for the right to profile")
    verdict = f"The trace holds {kernels.total():,} {what} and no product of matrices: {'; or '.join(reasons)}."
    return KernelTrace(path, dict(kernels), False, verdict)
