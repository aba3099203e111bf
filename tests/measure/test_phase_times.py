"""Kernels by kind, the time in which nothing runs, and phases profiled on a lane; figures are the machine's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from splitwiser_lab import Engine
from splitwiser_lab.errors import HardwareError
from splitwiser_lab.measure import phase_times as module
from splitwiser_lab.measure.op_times import kind_of
from splitwiser_lab.measure.phase_rates import WARM_UP, decode_batches, prefill_batches
from splitwiser_lab.measure.phase_times import ATTENTION, PRODUCTS, REST, Kernel, kernels_of, phase_times, times_of
from splitwiser_lab.predict import work as predict


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_kernel", PRODUCTS),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>", PRODUCTS),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", PRODUCTS),
        ("void gemvx::kernel<int, int, __nv_bfloat16, float>", PRODUCTS),
        ("ampere_fp16_s16816gemm_fp16_64x64_ldg8_f2f_stages_64x5_tn", PRODUCTS),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, cutlass::bfloat16_t>>", ATTENTION),
        ("void pytorch_flash::flash_fwd_splitkv_combine_kernel<cutlass::bfloat16_t>", ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_32_64x128", ATTENTION),
        ("void at::native::elementwise_kernel<128, 4, at::native::CUDAFunctor_add<c10::BFloat16>>", REST),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<int>>", REST),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16>", REST),
        ("Memcpy HtoD (Pinned -> Device)", REST),
    ],
)
def test_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def kernels_in(file: str) -> Iterator[str]:
    """The kernels that a module of ours launches; what they call carries no name of its own on a GPU."""
    spec = find_spec("splitwiser_lab.model")
    assert spec and spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    yield from (node.name for node in functions if node.decorator_list and not node.name.startswith("_"))


def test_our_own_kernels_are_known() -> None:
    assert {kind_of(name) for name in kernels_in("triton_attention.py")} == {ATTENTION}
    assert {kind_of(name) for name in kernels_in("triton_fused.py")} == {REST}


def test_idle_is_what_no_kernel_covers() -> None:
    kernels = [
        Kernel("my_flash", 1.0, 1.5),  # 0.5 s of nothing before
        Kernel("gemm", 0.0, 0.4),
        Kernel("add", 0.3, 0.5),  # beside the product
        Kernel("gemm", 1.5, 2.0),
        Kernel("add", 1.6, 1.8),
    ]
    seconds, kinds, idle, each = times_of(kernels)
    assert (seconds, idle) == (pytest.approx(2.0), pytest.approx(0.5))
    assert kinds == {PRODUCTS: pytest.approx(0.9), ATTENTION: pytest.approx(0.5), REST: pytest.approx(0.4)}
    assert each["gemm"] == pytest.approx(0.9)


def event(name: str, start: float, end: float, on: DeviceType = DeviceType.CUDA, note: bool = False) -> Any:
    """As PyTorch's profiler has it, in microseconds."""
    interval = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=interval, device_type=on, is_user_annotation=note)


def test_only_what_ran_on_the_gpu_counts() -> None:
    launch = event("cudaGraphLaunch", 0, 5, DeviceType.CPU)
    found = kernels_of([launch, event("decode", 0, 90, note=True), event("nvjet_tst", 10, 60)])
    assert found == [Kernel("nvjet_tst", pytest.approx(10e-6), pytest.approx(60e-6))]
    with pytest.raises(HardwareError, match=r"no kernels.*right to profile"):
        kernels_of([launch])


def test_a_phase_on_a_cpu_is_profiled_operator_by_operator(engine: Engine) -> None:
    times = phase_times(engine, prefill_batches(engine, 40, 2, WARM_UP + 6))
    assert times.batches == 3 and times.idle is None and times.undisturbed > 0
    assert all(spent > 0 for spent in times.by_kind.values())
    assert sum(times.by_kind.values()) == pytest.approx(times.seconds)
    assert times.work == predict.work(engine.config, predict.prefill(40, 2), 4) and times.longest


def test_rates_are_those_of_the_work_over_its_own_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four decode steps on a GPU that spends 1 s of each in products, 0.5 s in attention, and nothing else."""
    batches = decode_batches(engine, 4, 50, WARM_UP + 8, ragged=True)
    step = [("nvjet_tst", 0.0, 1e6), ("decode_kernel", 1.5e6, 2e6)]
    events = [event(name, 2e6 * n + start, 2e6 * n + end) for n in range(4) for name, start, end in step]

    def fake(lane: Any, profiled: Any) -> Any:
        assert len(profiled) == 4
        return times_of(kernels_of(events))

    monkeypatch.setattr(module, "_cpu_times", fake)
    times = phase_times(engine, batches)
    assert (times.seconds, times.idle) == (pytest.approx(2.0), pytest.approx(0.5))
    load = predict.work(engine.config, predict.decode(50, 4), 4)
    weights = sum(load.of(name).bytes for name in ("qkv", "output", "mlp", "head"))
    assert times.products_per_s("B/s") == pytest.approx(weights / 1.0)
    assert times.attention_per_s("B/s") == pytest.approx(load.of("attention").bytes / 0.5)
    assert times.attention_per_s("FLOP/s") == pytest.approx(load.of("attention").flops / 0.5)


def test_the_profiler_keeps_the_batches_that_count(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own, looking at operators instead of kernels: those of its first batches are not among them."""
    monkeypatch.setattr(torch.profiler, "ProfilerActivity", SimpleNamespace(CUDA=ProfilerActivity.CPU))
    seen: list[int] = []

    def kernels(events: Any) -> list[Kernel]:
        seen.append(sum(event.name == "aten::embedding" for event in events))
        return [Kernel("gemm", 0.0, 1.0)]

    lane = engine.new_lane("inline", "phase")
    lane.start()
    with monkeypatch.context() as patch:
        patch.setattr(module, "kernels_of", kernels)
        for count in (3, 6):
            module._gpu_times(lane, decode_batches(engine, 2, 20, count, ragged=False))
    assert seen == [3, 6]
    with pytest.raises(HardwareError, match="no kernels"):
        module._gpu_times(lane, decode_batches(engine, 2, 20, 3, ragged=False))
    lane.close()
