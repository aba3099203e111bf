"""Where the time of a piece of work goes, operator by operator, by PyTorch's own profiler.

Operators and GPU kernels, ours and a peer's, are told apart by their names alone: the same rule holds for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

OpTimes = list[tuple[str, float]]  # name, and seconds in it less those in the operators that it called

KINDS = ("matrix products", "attention", "everything else")
_NVIDIA = ("gemm", "gemv", "cublas", "cutlass", "nvjet", "xmma", "splitk")  # kernels of its libraries
_PRODUCTS = ("linear", "matmul", "::mm", "::bmm", "::addmm", "onednn_mm", "woq", "packed_mm", *_NVIDIA)
_OURS = ("decode_kernel", "prefill_kernel")  # of model.triton_attention
_ATTENTION = ("attention", "attn", "flash", "fmha", "sdpa", *_OURS)


def kind_of(name: str) -> str:
    """Which of `KINDS` an operator or a GPU kernel of this name belongs to."""
    name = name.lower()
    if "reshape_and_cache" in name or "cache_update" in name:  # keys and values on their way to the pages
        return KINDS[2]
    if any(part in name for part in _ATTENTION):  # before products: attention has some of its own
        return KINDS[1]
    return KINDS[0] if any(part in name for part in _PRODUCTS) else KINDS[2]


def by_kind(times: Iterable[tuple[str, float]], seconds: float) -> dict[str, float]:
    """Seconds of each kind out of `seconds` in all; what no operator accounts for is in "everything else"."""
    found = dict.fromkeys(KINDS, 0.0)
    for name, spent in times:
        found[kind_of(name)] += spent
    found[KINDS[2]] = seconds - found[KINDS[0]] - found[KINDS[1]]
    return found


def op_times(run: Callable[[], object]) -> OpTimes:
    """Call `run` under the profiler: the operators that this thread called, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    found = [(event.key, event.self_cpu_time_total / 1e6) for event in profiler.key_averages()]
    return sorted(found, key=lambda entry: -entry[1])
