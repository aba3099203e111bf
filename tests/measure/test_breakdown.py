"""Where the time of a phase goes: operators by kind, prefill taken off decode, peers that cannot be profiled."""

from __future__ import annotations

import pytest
import torch

from splitwiser_lab.measure.breakdown import Load, break_down
from splitwiser_lab.measure.op_times import KINDS, OpTimes, by_kind, kind_of, op_times
from splitwiser_lab.measure.peers import Peer

PRODUCTS, ATTENTION, REST = KINDS


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mkldnn::_linear_pointwise", PRODUCTS),
        ("_C::onednn_mm", PRODUCTS),
        ("aten::addmm", PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("_C::cpu_attention_with_kv_cache", ATTENTION),
        ("_C::cpu_attn_reshape_and_cache", REST),
        ("vllm::unified_kv_cache_update", REST),
        ("aten::mul", REST),
        ("aten::index_select", REST),
    ],
)
def test_operators_of_all_peers_fall_into_the_same_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_what_no_operator_accounts_for_is_everything_else() -> None:
    times = [("aten::mm", 3.0), ("aten::mm", 1.0), ("my::attention", 2.0), ("aten::add", 0.5)]
    assert by_kind(times, 10.0) == {PRODUCTS: 4.0, ATTENTION: 2.0, REST: 4.0}


def test_a_real_product_is_seen() -> None:
    a = torch.rand(256, 256)
    times = dict(op_times(lambda: [a @ a for _ in range(10)]))
    assert times["aten::mm"] > 0
    assert max(times, key=lambda name: times[name]) == "aten::mm"


class Scripted(Peer):
    """Prefill takes 2 s, of which 1 s in products; a decode step 0.5 s, of which 0.1 s in attention."""

    def __init__(self, name: str, seen: bool = True) -> None:
        self.name, self._seen, self.asked = name, seen, 0

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        raise AssertionError("a breakdown profiles")

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        assert [len(prompt) for prompt in prompts] == [16, 16]
        self.asked += 1
        steps = new_tokens - 1
        times = [("aten::mm", 1.0), ("x::attention", 0.1 * steps)]
        return 2.0 + 0.5 * steps, times if self._seen else []

    def close(self) -> None:
        pass


def test_decode_is_what_the_steps_add_to_prefill() -> None:
    peers = [Scripted("ours"), Scripted("hidden", seen=False)]
    prefill = break_down(peers, Load("prefill", 2, 16, 1), 100, repeats=2)
    decode = break_down(peers, Load("decode", 2, 16, 5), 100, repeats=2)
    assert [part.peer for part in (*prefill, *decode)] == ["ours", "ours"]
    assert prefill[0].ms == {PRODUCTS: [1000.0, 1000.0], ATTENTION: [0.0, 0.0], REST: [1000.0, 1000.0]}
    assert decode[0].ms[PRODUCTS] == [0.0, 0.0]
    assert decode[0].ms[ATTENTION] == pytest.approx([100.0, 100.0])
    assert decode[0].ms[REST] == pytest.approx([400.0, 400.0])
    assert decode[0].longest["x::attention"] == pytest.approx(100.0)
    assert [peer.asked for peer in peers] == [3 * (1 + 2), 1 + 1]  # who cannot be profiled is asked once
