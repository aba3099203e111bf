"""The counts equal those made by hand for two models; the roofs and the predictions follow from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import tiny

from splitwiser_lab.hardware import Choice
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.runner import PlainRunner
from splitwiser_lab.predict import kernels
from splitwiser_lab.predict.ceilings import DATASHEETS, Ceilings, measure_ceilings
from splitwiser_lab.predict.kernels import Kernels, measure_kernels
from splitwiser_lab.predict.roofline import bound, least_seconds, overlap_limit, predict_seconds
from splitwiser_lab.predict.work import Part, decode, numbers_between, parts_of, prefill, work

_SHAPE = {"norm_eps": 1e-5, "tied": True, "output_bias": False, "mlp_bias": False, "qk_norm": False}
SMOLLM = ModelConfig(
    **{"family": "llama", "vocab_size": 49152, "hidden": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64},
    **{"intermediate": 1536, "context": 8192, "activation": "silu", "qkv_bias": False, "inv_freq": (1.0,) * 32},
    **_SHAPE,
)
OPT = ModelConfig(
    **{"family": "opt", "vocab_size": 50272, "hidden": 768, "layers": 12, "heads": 12, "kv_heads": 12, "head_dim": 64},
    **{"intermediate": 3072, "context": 2048, "activation": "relu", "qkv_bias": True},
    **{**_SHAPE, "output_bias": True, "mlp_bias": True},
)
LLAMA_8B = replace(
    SMOLLM,
    **{"vocab_size": 128256, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128},
    **{"intermediate": 14336, "tied": False},
)
ROUND = Ceilings("round", "float32", 100.0, 10.0, "made up")


class TestSmolLM:
    """SmolLM2-135M in float32, by hand. One layer has
    qkv 576 × (9 + 3 + 3) × 64 = 552,960, output 576 × 576 = 331,776, mlp 3 × 576 × 1536 = 2,654,208 weights;
    30 layers 106,168,320; the head, shared with the embedding, 49,152 × 576 = 28,311,552.
    """

    def test_prefill_of_512_tokens(self):
        found = work(SMOLLM, prefill(512), 4)
        assert found.of("qkv").flops == 2 * 512 * 30 * 552_960
        assert found.of("output").flops == 2 * 512 * 30 * 331_776
        assert found.of("mlp").flops == 2 * 512 * 30 * 2_654_208
        assert found.of("attention").flops == 4 * 30 * 9 * 64 * (512 * 513 / 2)  # 9.08 GFLOP
        assert found.of("head").flops == 2 * 28_311_552  # only the last token's logits
        assert found.flops == 2 * 512 * 106_168_320 + 69_120 * 131_328 + 56_623_104

    def test_bytes_of_a_decode_step(self):
        found = work(SMOLLM, decode(513), 4)
        assert found.of("attention").bytes == 513 * 46_080  # 30 layers × 2 × 3 × 64 × 4 bytes a token
        assert found.of("head").bytes == 113_246_208
        assert found.of("rest").bytes == 4 * (61 * 576 + 576)  # 2 norms a layer and the last; one row of the table
        assert found.bytes == 4 * (106_168_320 + 28_311_552 + 62 * 576) + 513 * 46_080
        assert found.flops == 2 * (106_168_320 + 28_311_552) + 4 * 30 * 9 * 64 * 513
        assert found.intensity == pytest.approx(0.54, abs=0.005)

    def test_weights_are_read_once_for_a_whole_batch(self):
        one, eight = (work(SMOLLM, decode(513, batch), 4) for batch in (1, 8))
        assert eight.flops == 8 * one.flops
        assert eight.bytes - one.bytes == 7 * (513 * 46_080 + 4 * 576)

    def test_half_precision_halves_the_bytes_only(self):
        full, half = (work(SMOLLM, prefill(64, 2), size) for size in (4, 2))
        assert (half.flops, 2 * half.bytes) == (full.flops, full.bytes)


class TestOpt:
    """OPT-125M in float16, by hand. One layer has
    qkv 3 × 768² = 1,769,472, output 768² = 589,824, mlp 2 × 768 × 3072 = 4,718,592 weights, biases of
    2304 + 768 + 3072 + 768 and two norms of 2 × 768; 12 layers 84,934,656; the head 50,272 × 768 = 38,608,896.
    """

    def test_the_papers_prompt(self):
        found = work(OPT, prefill(1024, 20), 2)
        assert found.of("mlp").flops == 2 * 20_480 * 12 * 4_718_592
        assert found.of("attention").flops == 4 * 12 * 768 * 20 * (1024 * 1025 / 2)
        assert found.flops == 2 * 20_480 * 84_934_656 + 36_864 * 20 * 524_800 + 2 * 20 * 38_608_896
        assert found.of("attention").bytes == 20 * 1024 * 36_864  # 12 layers × 2 × 768 × 2 bytes a token

    def test_a_decode_step_looks_up_two_tables_and_reads_biases(self):
        found = work(OPT, decode(1025, 20), 2)
        assert found.of("rest").bytes == 2 * (12 * (6912 + 3072) + 1536 + 2 * 20 * 768)
        assert found.of("qkv").bytes == 2 * 12 * 1_769_472
        assert numbers_between(OPT, 20) == 20 * 12 * (2 * 768 + 3072)


class TestParts:
    def test_a_chunk_looks_back_at_all_before_it(self):
        assert Part(4, 10).pairs == 7 + 8 + 9 + 10
        assert Part(10, 10).pairs == sum(range(1, 11)) == Part(6, 6).pairs + Part(4, 10).pairs
        assert Part(1, 10).pairs == 10

    def test_chunks_take_the_arithmetic_of_the_whole_and_read_the_weights_again(self):
        chunks = [work(SMOLLM, [part], 4) for part in (Part(256, 256, picks=False), Part(256, 512))]
        whole = work(SMOLLM, prefill(512), 4)
        assert sum(chunk.flops for chunk in chunks) == whole.flops
        assert sum(chunk.of("mlp").bytes for chunk in chunks) == 2 * whole.of("mlp").bytes
        assert chunks[0].of("head") == replace(whole.of("head"), flops=0, bytes=0, rows=0, weights=0)

    def test_a_batch_of_the_engine_is_counted_as_it_is(self):
        decoding = Sequence([7], 40, [0, 1], GREEDY)
        half_prompt, rest_of_prompt = Sequence([1] * 8, 0, [2], None), Sequence([1] * 4, 8, [3], GREEDY)
        found = parts_of(Batch([decoding], [half_prompt, rest_of_prompt]))
        assert found == (Part(1, 41), Part(8, 8, picks=False), Part(4, 12))


class TestRoofs:
    def test_the_slower_roof_decides(self):
        slim, fat = work(SMOLLM, decode(100), 4), work(SMOLLM, prefill(1000), 4)
        assert ROUND.ridge == 10.0
        assert bound(slim, ROUND) == "memory" and least_seconds(slim, ROUND) == slim.bytes / 10
        assert bound(fat, ROUND) == "compute" and least_seconds(fat, ROUND) == fat.flops / 100

    def test_the_h200_measured_by_others_is_not_below_its_limit(self):
        """An 8B model in bfloat16 on an H200: prefill 1×2048 took 51.6 ms, a decode step 32@1024 took 6.1 ms."""
        h200 = Ceilings("H200", "bfloat16", 790e12, 4.26e12, "measured")
        long, step = work(LLAMA_8B, prefill(2048), 2), work(LLAMA_8B, decode(1024, 32), 2)
        assert 0.7 * 51.6 < least_seconds(long, h200) * 1e3 < 51.6
        assert 0.7 * 6.1 < least_seconds(step, h200) * 1e3 < 6.1
        assert overlap_limit(long, step, h200).gain == pytest.approx(1.8, abs=0.05)

    @pytest.mark.parametrize("sheet", DATASHEETS.values(), ids=DATASHEETS)
    def test_every_data_sheet_names_its_source_and_leaves_decode_to_memory(self, sheet: Ceilings):
        assert sheet.source and sheet.name and sheet.dtype in ("float32", "float16", "bfloat16")
        assert 5 < sheet.ridge < 400
        assert bound(work(SMOLLM, decode(512), 2), sheet) == "memory"
        assert bound(work(SMOLLM, prefill(2048), 2), sheet) == "compute"

    def test_ceilings_are_measured(self):
        found = measure_ceilings("cpu", "float32")
        assert found.flops_per_s > 1e8 and found.bytes_per_s > 1e8
        assert found.source == "measured here" and found.dtype == "float32"


class TestOverlapLimit:
    def test_phases_that_need_different_things_overlap_perfectly(self):
        only_compute, only_memory = _Made(100.0, 0.0), _Made(0.0, 10.0)
        limit = overlap_limit(only_compute, only_memory, ROUND)
        assert (limit.prefill, limit.decode, limit.gain) == (1.0, 1.0, 2.0)

    def test_phases_that_need_the_same_gain_nothing(self):
        assert overlap_limit(_Made(100.0, 1.0), _Made(100.0, 1.0), ROUND).gain == pytest.approx(1.0)

    def test_a_shared_roof_is_shared(self):
        """Prefill uses all arithmetic and 20 % of the bandwidth, decode all bandwidth and 10 % of the arithmetic:
        x + 0.1 y = 1 and 0.2 x + y = 1 give x = 0.9 / 0.98, y = 0.8 / 0.98.
        """
        limit = overlap_limit(_Made(100.0, 2.0), _Made(10.0, 10.0), ROUND)
        assert (limit.prefill, limit.decode) == pytest.approx((0.9 / 0.98, 0.8 / 0.98))

    def test_a_phase_that_falls_short_of_its_roof_leaves_more_to_the_other(self):
        assert overlap_limit(_Made(100.0, 2.0), _Made(10.0, 10.0), ROUND, prefill_s=2.0, decode_s=2.0).gain == 2.0


KERNELS = Kernels(ROUND, ((1, 1.0), (4, 2.0), (10, 5.0)), 50.0, 0.5, 3.0, 7.0, waits_for_host=False)


class TestPrediction:
    def test_products_follow_the_measured_rows(self):
        assert KERNELS.product_seconds(1, 10) == 10.0
        assert KERNELS.product_seconds(2, 10) == pytest.approx(10 * 4 / 3)
        assert KERNELS.product_seconds(7, 10) == pytest.approx(35.0)
        assert KERNELS.product_seconds(30, 10) == pytest.approx(150.0), "at the FLOP/s of the last"

    def test_operators_add_up(self):
        batch = work(SMOLLM, decode(100), 4)
        attention = max(batch.of("attention").flops / 50, 3 * batch.of("attention").bytes / 10)
        expected = 134_479_872 + attention + 0.5 * numbers_between(SMOLLM, 1) + 30 * 3.0 + 7.0
        assert predict_seconds(SMOLLM, decode(100), KERNELS, 4) == pytest.approx(expected)

    def test_a_gpu_waits_for_the_slower_of_host_and_device(self):
        slow_host = replace(KERNELS, waits_for_host=True, layer_s=1e12)
        assert predict_seconds(SMOLLM, decode(100), slow_host, 4) == pytest.approx(30e12)
        quick_host = replace(KERNELS, waits_for_host=True)
        assert predict_seconds(SMOLLM, decode(100), quick_host, 4) == pytest.approx(
            predict_seconds(SMOLLM, decode(100), KERNELS, 4) - 97.0
        )

    @pytest.mark.parametrize("family", ["llama", "opt"])
    def test_kernels_are_measured_for_every_family(self, family: str):
        config = ModelConfig.from_hf(tiny(family).config)
        found = measure_kernels(config, "cpu", "float32")
        assert min(found.attention_flops_per_s, found.number_s, found.batch_s + found.layer_s) > 0
        assert all(seconds > 0 for _, seconds in found.products) and not found.waits_for_host
        assert not torch.is_inference_mode_enabled()
        assert predict_seconds(config, prefill(64), found, 4) > predict_seconds(config, decode(64), found, 4) > 0

    def test_what_is_timed_is_what_the_engine_would_run(self, monkeypatch: pytest.MonkeyPatch):
        ran: list[Batch] = []

        class Fast(PlainRunner):
            def run(self, batch: Batch, on_launch: Any = lambda: None) -> torch.Tensor:
                ran.append(batch)
                return super().run(batch, on_launch)

        monkeypatch.setattr(kernels, "runner_for", Fast)
        monkeypatch.setattr(kernels, "choose_kernels", lambda device, dtype: Choice("triton", "made for the test"))
        found = measure_kernels(ModelConfig.from_hf(tiny("llama").config), "cpu", "float32")
        assert len(ran) > 20 and not any(batch.prefill for batch in ran)
        assert found.kv_passes == 1  # pages are read in place
        context = decode(4000)
        assert predict_seconds(SMOLLM, context, KERNELS, 4) > predict_seconds(
            SMOLLM, context, replace(KERNELS, kv_passes=1), 4
        )


class _Made:
    """Work of so many FLOPs and bytes."""

    def __init__(self, flops: float, bytes: float) -> None:
        self.flops, self.bytes = flops, bytes
