"""Rates derived from spans equal the work of the batches that ran."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitwiser_lab import Engine
from splitwiser_lab.measure.achieved import achieved, span_work
from splitwiser_lab.predict.ceilings import Ceilings
from splitwiser_lab.predict.work import Part, decode, prefill, work
from splitwiser_lab.timeline import Span, Timeline


def test_spans_carry_the_work_of_their_batches(engine: Engine):
    result = engine.generate([list(range(40)), list(range(24))], 3, ignore_eos=True)
    first, *steps = result.timeline.spans
    assert span_work(first, engine.config, 4) == work(engine.config, [Part(40, 40), Part(24, 24)], 4)
    assert span_work(steps[-1], engine.config, 4) == work(engine.config, [Part(1, 42), Part(1, 26)], 4)


def test_chunks_say_what_they_looked_back_at_and_that_they_picked_nothing(engine: Engine):
    engine.set_mode("chunked", chunk_tokens=16)
    spans = engine.generate(list(range(40)), 2, ignore_eos=True).timeline.spans
    assert [span.picked for span in spans] == [0, 0, 1, 1]
    assert span_work(spans[1], engine.config, 4) == work(engine.config, [Part(16, 32, picks=False)], 4)
    assert sum(span.attended_pairs or 0 for span in spans[:3]) == 40 * 41 // 2


def test_rates_are_work_over_time_and_cut_spans_count_in_part(engine: Engine):
    config, ceilings = engine.config, Ceilings("made up", "float32", 1e9, 1e8, "a test")
    costs = {"context_tokens": 64, "attended_pairs": 64 * 65 // 2, "picked": 1}
    long = Span("main", "prefill", 0.0, 2.0, 64, 0, 1, "sequential", **costs)
    step = Span("main", "decode", 2.0, 3.0, 0, 1, 1, "sequential", context_tokens=65, attended_pairs=65, picked=1)
    found = achieved([long, step], config, 4, 1.0, 3.0, ceilings)
    assert found is not None and found.prefill_share is not None
    assert found.prefill_flops_per_s == pytest.approx(0.5 * work(config, prefill(64), 4).flops / 2)
    assert found.decode_bytes_per_s == pytest.approx(work(config, decode(65), 4).bytes / 2)
    assert found.prefill_share == pytest.approx(found.prefill_flops_per_s / 1e9)
    assert found.decode_share == pytest.approx(found.decode_bytes_per_s / 1e8)


def test_a_mixed_batch_counts_in_both(engine: Engine):
    mixed = Span("main", "mixed", 0.0, 1.0, 8, 2, 3, "chunked", context_tokens=60, attended_pairs=90, picked=3)
    found, whole = achieved([mixed], engine.config, 4, 0.0, 1.0), span_work(mixed, engine.config, 4)
    assert found is not None and whole is not None
    assert (found.prefill_flops_per_s, found.decode_bytes_per_s) == (whole.flops, whole.bytes)


def test_old_recordings_without_costs_give_no_rate_but_are_read(engine: Engine):
    old = Span("main", "decode", 0.0, 1.0, 0, 1, 1, "sequential")
    assert achieved([old], engine.config, 4, 0.0, 1.0) is None
    assert achieved([old], engine.config, 4, 5.0, 6.0) is not None, "it lies outside"
    assert Timeline.from_json(Timeline((old,), ()).to_json()).spans == (old,)
    new = replace(old, context_tokens=9, attended_pairs=9, picked=1)
    assert Timeline.from_json(Timeline((new,), ()).to_json()).spans == (new,)


def test_an_empty_window_is_refused(engine: Engine):
    with pytest.raises(ValueError, match="positive length"):
        achieved([], engine.config, 4, 1.0, 1.0)
