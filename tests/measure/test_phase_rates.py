"""Phases measured on a lane by hand: shapes, work, and refusals; the figures themselves are the machine's."""

from __future__ import annotations

import pytest

from splitwiser_lab import Engine
from splitwiser_lab.errors import RequestError
from splitwiser_lab.measure.phase_rates import _ragged, decode_rate, prefill_rate
from splitwiser_lab.predict import work as predict


def test_both_phases(engine: Engine) -> None:
    prefill = prefill_rate(engine, 40, batch=2, repeats=3)
    decode = decode_rate(engine, 4, 50, repeats=5)
    assert (prefill.phase, prefill.batch, prefill.tokens, prefill.repeats) == ("prefill", 2, 40, 3)
    assert (decode.phase, decode.batch, decode.tokens, decode.repeats) == ("decode", 4, 50, 6)
    for rate in (prefill, decode):
        assert 0 < rate.fastest <= rate.seconds <= rate.slowest
        assert rate.flops_per_s * rate.seconds == pytest.approx(rate.flops)
    assert prefill.flops == predict.work(engine.config, predict.prefill(40, 2), 4).flops
    assert decode.bytes == pytest.approx(predict.work(engine.config, predict.decode(50, 4), 4).bytes)


def test_ragged_contexts_make_the_same_sum() -> None:
    contexts = _ragged(32, 1024)
    assert sum(contexts) == 32 * 1024
    assert min(contexts) < 700 and max(contexts) > 1300


def test_what_does_not_fit_is_refused_with_the_way_out(engine: Engine) -> None:
    with pytest.raises(RequestError, match="kv_tokens="):
        decode_rate(engine, 100, 1000)
