"""NVTX ranges carry the names a profiler shows, and cost nothing where there is no CUDA."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from splitwiser_lab.lanes.ranges import batch_range
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence

BATCH = Batch([Sequence([1], 5, [0], GREEDY)], [Sequence([2, 3, 4], 0, [1], None)])


def test_a_range_names_lane_phase_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextmanager
    def record(message: str) -> Any:
        said.append(message)
        yield

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nvtx, "range", record)
    with batch_range("main", BATCH):
        pass
    assert said == ["main: mixed, 4 tokens, 2 sequences"]


def test_without_cuda_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with batch_range("main", BATCH) as nothing:
        assert nothing is None
