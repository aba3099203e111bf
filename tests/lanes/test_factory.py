"""Which lanes are built on which shares of the cores, and why some cannot be."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny

from splitwiser_lab.errors import ModeError
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.lanes.factory import LaneHouse, share_cores
from splitwiser_lab.lanes.inline import InlineLane
from splitwiser_lab.lanes.process import ProcessLane
from splitwiser_lab.lanes.support import why_not
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.loading import load
from splitwiser_lab.model.transformer import Transformer


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    weights = load(tiny("llama"), "cpu", torch.float32).weights
    return Transformer(weights, KVPool(weights.config, torch.float32, "cpu", 64, 8))


def lanes_of(transformer: Transformer, kind: type) -> list[Lane]:
    return [kind("prefill", transformer), kind("decode", transformer)]


@pytest.mark.parametrize(
    ("available", "decode_cores", "shares"),
    [
        ([0, 1], None, {"decode": [0], "prefill": [1]}),
        ([0, 1, 2, 3, 4], None, {"decode": [0, 1], "prefill": [2, 3, 4]}),
        ([2, 5, 7, 9], 1, {"decode": [2], "prefill": [5, 7, 9]}),
        ([2, 5, 7, 9], 3, {"decode": [2, 5, 7], "prefill": [9]}),
        ([3], None, {"decode": [3], "prefill": [3]}),
        ([3], 1, {"decode": [3], "prefill": [3]}),
    ],
)
def test_shares_of_the_cores(
    transformer: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    available: list[int],
    decode_cores: int | None,
    shares: dict[str, list[int]],
) -> None:
    monkeypatch.setattr("splitwiser_lab.lanes.factory.cores", lambda: available)
    assert share_cores(lanes_of(transformer, ProcessLane), decode_cores) == shares
    assert share_cores(lanes_of(transformer, InlineLane)) == {}


@pytest.mark.parametrize("decode_cores", [4, 5, 100])
def test_a_share_that_leaves_none(transformer: Transformer, monkeypatch: pytest.MonkeyPatch, decode_cores: int) -> None:
    monkeypatch.setattr("splitwiser_lab.lanes.factory.cores", lambda: [0, 1, 2, 3])
    with pytest.raises(ModeError, match=f"decode_cores={decode_cores} leaves none.*4 cores.*at most 3"):
        share_cores(lanes_of(transformer, ProcessLane), decode_cores)


def test_kinds_that_cannot_be_built_say_why(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("inline", "cpu") is why_not("process", "cpu") is why_not("inline", "cuda") is None
    with pytest.raises(ModeError, match=r"'stream'.*GPU"):
        LaneHouse(transformer).build("stream", "decode", {})
    monkeypatch.setattr("sys.platform", "win32")
    assert "Linux, macOS" in (why_not("process", "cpu") or "")


# -- the worker's loop, by itself
