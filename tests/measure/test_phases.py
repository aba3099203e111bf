"""Times of the two phases come from the spans, and rows say what was in a step."""

from __future__ import annotations

import pytest

from splitwiser_lab import Engine, RequestError
from splitwiser_lab.measure.phases import time_phases

PROMPT = list(range(40))


@pytest.mark.parametrize("mode", ["sequential", "chunked"])
def test_one_row_for_each_phase(engine: Engine, mode: str):
    engine.set_mode(mode)
    prefill, decode = time_phases(engine, PROMPT, new_tokens=8)
    assert (prefill["phase"], prefill["tokens"], prefill["batch"]) == ("prefill", 40, 1)
    assert (decode["phase"], decode["tokens"], decode["batch"]) == ("decode", 44, 1)
    assert prefill["tokens_per_s"] == pytest.approx(40 / prefill["ms"] * 1e3)
    assert decode["tokens_per_s"] == pytest.approx(1 / decode["ms"] * 1e3)
    assert set(prefill) == set(decode) == {"phase", "tokens", "batch", "ms", "tokens_per_s"}


def test_a_batch_counts_all_its_tokens(engine: Engine):
    prefill, decode = time_phases(engine, PROMPT, new_tokens=8, batch=4, repeats=1)
    assert prefill["tokens_per_s"] == pytest.approx(160 / prefill["ms"] * 1e3)
    assert decode["tokens_per_s"] == pytest.approx(4 / decode["ms"] * 1e3)


def test_a_long_prompt_in_chunks_is_one_prefill(engine: Engine):
    engine.set_mode("chunked", chunk_tokens=8)
    prefill, _ = time_phases(engine, PROMPT, new_tokens=4, repeats=1)
    assert prefill["tokens"] == 40


@pytest.mark.parametrize("wrong", [{"new_tokens": 1}, {"batch": 0}, {"repeats": 0}])
def test_what_cannot_be_timed_is_refused(engine: Engine, wrong: dict[str, int]):
    with pytest.raises(RequestError, match="at least 2 new tokens"):
        time_phases(engine, PROMPT, **{"new_tokens": 4, **wrong})


def test_a_batch_that_never_decodes_together_says_so(engine: Engine):
    engine.set_mode("sequential", max_batch=2)
    with pytest.raises(RequestError, match="never decoded together"):
        time_phases(engine, PROMPT, new_tokens=4, batch=4, repeats=1)
