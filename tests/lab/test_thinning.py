"""A thinned run keeps its time and its tokens, and says how it was thinned."""

from __future__ import annotations

import pytest
from runs_to_draw import processes, span, steps

from splitwiser_lab.lab.thinning import thinned


def test_thinning_keeps_time_and_tokens() -> None:
    timeline = steps(5000)
    bars, shortest = thinned(timeline.spans, 200)
    assert len(bars) <= 200 < 5000
    assert shortest > 0.01
    assert sum(bar.spans for bar in bars) == 5000
    assert sum(bar.decode_tokens for bar in bars) == sum(s.decode_tokens for s in timeline.spans)
    for phase in ("prefill", "decode"):
        drawn = sum(bar.ms for bar in bars if bar.phase == phase)
        assert drawn == pytest.approx(sum(s.seconds for s in timeline.spans if s.phase == phase) * 1e3, rel=0.05)


def test_few_spans_are_not_thinned() -> None:
    bars, shortest = thinned(processes().spans, 2000)
    assert (len(bars), shortest) == (5, 0.0)
    assert thinned((), 10) == ([], 0.0)
    assert len(thinned([span("a", "decode", 1.0, 1.0)] * 50, 10)[0]) == 1  # instants, all at once


def test_steps_longer_than_the_threshold_are_kept_apart_until_the_limit_asks() -> None:
    spans = [span("a", "decode", i, i + 1) for i in range(4)] + [
        span("a", "decode", 4 + i / 10, 4.09 + i / 10) for i in range(5)
    ]
    bars, shortest = thinned(spans, 100, shortest=0.5)
    assert [bar.spans for bar in bars] == [1, 1, 1, 1, 5]
    assert shortest == 0.5
    assert bars[-1].end == pytest.approx(4.49)
