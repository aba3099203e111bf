"""The rate while every process has work, on timelines made by hand: never above what either phase does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from splitwiser_lab.pipelines.result import PipelineResult
from splitwiser_lab.timeline import ModeChange, RequestRecord, Span, Timeline

ROWS, STEPS = 2, 3  # prompts in a batch, decode steps of each


def split(prefills: Sequence[tuple[float, float]], decodes: Sequence[tuple[float, float]]) -> PipelineResult:
    """Batch i is prefilled in the i-th of `prefills` and decoded in the i-th of `decodes`, step after step."""
    spans, requests = [], []
    for (begin, first), (taken, end) in zip(prefills, decodes, strict=True):
        step = (end - taken) / STEPS
        times = [taken + step * (number + 1) for number in range(STEPS)]
        spans.append(Span("prefill", "prefill", begin, first, 8 * ROWS, 0, ROWS, "split"))
        spans += [Span("decode", "decode", time - step, time, 0, ROWS, ROWS, "split") for time in times]
        record = RequestRecord(len(requests), 8, 0.0, (first, *times), begin, first, end, "length")
        requests += [record] * ROWS
    timeline = Timeline(tuple(sorted(spans, key=lambda span: span.end)), tuple(requests), (ModeChange(0.0, "split"),))
    return PipelineResult((), timeline, None)


def test_prompts_prefilled_ahead_are_no_output() -> None:
    """Prefill is three batches ahead when the window ends, after 8 s; decode does 2 of 3 tokens in a second."""
    result = split(
        [(0, 1), (1, 2), (2, 3), (4, 5), (7, 8)],
        [(1, 4), (4, 7), (7, 10), (10, 13), (13, 16)],
    )
    steady = result.steady
    assert steady is not None and (steady.start, steady.end) == (1, 8)
    in_window = sum(1 < time <= 8 for request in result.timeline.requests for time in request.token_times)
    decode_alone = ROWS * (1 + STEPS) / 3  # a batch takes it 3 s, and writes all but the first of the tokens
    assert in_window / 7 > decode_alone, "as a plain count would have it"
    assert steady.output_throughput == pytest.approx(decode_alone)
    assert steady.request_throughput == pytest.approx(ROWS / 3)


def test_a_store_that_was_filled_before_the_window_does_not_make_up_for_prefill() -> None:
    """Three batches wait when decode begins; prefill then takes 3 s for each, and decode 1.5 s."""
    result = split(
        [(0, 1), (1, 2), (2, 3), (3, 6), (6, 9), (9, 12)],
        [(3, 4.5), (4.5, 6), (6, 7.5), (7.5, 9), (9, 10.5), (12, 13.5)],
    )
    steady = result.steady
    assert steady is not None and (steady.start, steady.end) == (3, 12)
    assert steady.request_throughput == pytest.approx(ROWS / 3), "prefill's rate, though decode did five batches"
    assert steady.output_throughput == pytest.approx(ROWS * (1 + STEPS) / 3)


def test_two_phases_in_step_get_the_rate_of_both() -> None:
    steady = split([(n, n + 1) for n in range(6)], [(n, n + 1) for n in range(1, 7)]).steady
    assert steady is not None and (steady.start, steady.end) == (1, 6)
    assert steady.output_throughput == pytest.approx(ROWS * (1 + STEPS))


@pytest.mark.parametrize(
    ("prefills", "decodes"),
    [
        ([(0, 1), (1, 2)], [(1, 2), (2, 3)]),  # one batch in both
        ([(0, 1)], [(1, 2)]),  # never both
        ([(0, 1), (1, 2), (2, 3), (3, 4)], [(1, 10), (10, 19), (19, 28), (28, 37)]),  # all prefilled in a third of one
    ],
)
def test_fewer_than_two_batches_tell_nothing(
    prefills: list[tuple[float, float]], decodes: list[tuple[float, float]]
) -> None:
    result = split(prefills, decodes)
    assert result.steady is None
