"""How rivals are measured: warmed up at full size, and paired with ours round by round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from splitwiser_lab.measure.gpu_suite.job import Job, over
from splitwiser_lab.measure.gpu_suite.plan import SMALL, ChatLimits
from splitwiser_lab.measure.gpu_suite.rivals import _by_turns
from splitwiser_lab.measure.op_times import OpTimes
from splitwiser_lab.measure.peers import Peer


class Timed(Peer):
    """Takes `seconds` in each call; remembers what it was asked for."""

    def __init__(self, name: str, seconds: list[float]) -> None:
        self.name, self.settings, self._seconds, self.asked = name, f"as {name} comes", seconds, []

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        self.asked.append((len(prompts), new_tokens))
        return self._seconds[len(self.asked) - 1], [[7] * new_tokens for _ in prompts]

    def profile(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, OpTimes]:
        raise AssertionError("rivals are not profiled")

    def close(self) -> None:
        raise AssertionError("the caller closes")


class Busy(Job):
    """Has no time for what is named in `skipped`."""

    skipped: tuple[str, ...] = ()

    def time_for(self, what: str, seconds: float) -> bool:
        return what not in self.skipped


@pytest.fixture
def job() -> Busy:
    quiet: dict[str, Any] = {"report": lambda _: None, "written": lambda: None}
    return Busy("peers", "tiny", "tiny", SMALL, ChatLimits(), 3, 1e9, **quiet, device="cpu", dtype="float32")


def test_a_round_that_is_skipped_shifts_no_pairs(job: Busy) -> None:
    job.skipped = ("splitwiser_lab, round 1",)
    ours, theirs = Timed("splitwiser_lab", [9, 2, 4]), Timed("HF", [9, 1, 4, 8])
    _by_turns(job, [ours, theirs], [[1] * 16] * 8)
    rows = {row["peer"]: row for row in job.rows}
    assert rows["HF"]["ours_over_theirs"]["samples"] == [2.0, 2.0], "rounds 2 and 3, each with its own"
    assert (
        len(rows["HF"]["output_tok_s"]["samples"]) == 3 and len(rows["splitwiser_lab"]["output_tok_s"]["samples"]) == 2
    )
    assert rows["HF"]["settings"] == "as HF comes"


def test_the_warm_up_is_the_whole_work_and_no_sample(job: Busy) -> None:
    job.plan = replace(SMALL, peer_output=128)
    peer = Timed("splitwiser_lab", [100.0, 1.0, 1.0, 1.0])
    _by_turns(job, [peer], [[1] * 16] * 24)
    assert peer.asked == [(24, 128)] * 4
    assert job.rows[0]["output_tok_s"]["samples"] == [24 * 128.0] * 3


def test_without_a_common_round_there_is_no_ratio() -> None:
    assert over({1: 4.0, 3: 9.0}, {1: 2.0, 2: 5.0}) == [2.0]
    assert over({1: 4.0}, {2: 5.0}) == []
