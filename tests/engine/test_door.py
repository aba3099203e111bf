"""Bad input: each gives an error that says what was seen and what to do, runs nothing, and the next call works."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from conftest import MakeEngine
from tiny_models import build, expected, prompts_of, tiny

from splitwiser_lab import Engine, HardwareError, ModeError, RequestError, SplitwiserError
from splitwiser_lab.hardware import cores

GOOD = prompts_of(10, 20)


def still_works(engine: Engine) -> None:
    assert engine.kv_use == 0
    assert engine.generate(GOOD, 4).tokens == expected("llama", GOOD, 4)


@pytest.mark.parametrize(
    ("prompts", "sampling", "says"),
    [
        ([], {}, "no prompts given"),
        (None, {}, "prompts are a text.*None"),
        ([[]], {}, "empty"),
        ([[1, 2], []], {}, "prompt 1: .*empty"),
        ([5] * 257, {"max_new_tokens": 1}, "257 prompt tokens and 1 new.*context.*256.*shorten"),
        ([5] * 200, {"max_new_tokens": 57}, "make 257"),
        ([1, 199], {}, "199.*vocabulary of 199"),
        ([1, -1], {}, "-1.*vocabulary"),
        ([[1, 2], [1.5]], {}, "prompt 1: .*token ids.*1.5"),
        ([[1], ["one"]], {}, "prompt 1: .*token ids"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0.*at least 1"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ([1], {"temperature": "hot"}, "temperature='hot'"),
        ([1], {"temperature": -0.1}, "temperature=-0.1"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"temperature": float("inf")}, "temperature=inf"),
        ([1], {"top_p": 0.0}, "top_p=0"),
        ([1], {"top_p": 1.5}, "top_p=1.5"),
        ([1], {"top_p": float("nan")}, "top_p=nan"),
        ([1], {"stop": "x"}, "tokenizer"),
        ("text without a tokenizer", {}, "no tokenizer.*token ids"),
    ],
)
def test_requests(engine: Engine, prompts: Any, sampling: dict[str, Any], says: str) -> None:
    before = len(engine.timeline().spans)
    with pytest.raises(RequestError, match=says):
        engine.generate(prompts, **sampling)
    assert len(engine.timeline().spans) == before, "nothing ran, not even the good prompts of the call"
    still_works(engine)


def test_texts_need_a_tokenizer(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"result\.tokens"):
        _ = engine.generate(GOOD, 2).texts


def test_an_empty_stop_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._intake, "_tokenizer", object())
    with pytest.raises(RequestError, match="empty text"):
        engine.generate([1], stop=["a", ""])


def test_prompt_longer_than_the_pool() -> None:
    with Engine.from_pretrained(tiny("llama"), kv_tokens=64) as engine:
        with pytest.raises(RequestError, match=r"61 prompt tokens and 4 new ones make 65.*KV pool.*64.*kv_tokens"):
            engine.generate([5] * 61, 4)
        still_works(engine)


def test_numbers_of_other_libraries_are_token_ids(engine: Engine) -> None:
    wanted = expected("llama", GOOD[:1], 4)
    assert engine.generate(torch.tensor(GOOD[:1]), 4).tokens == wanted
    assert engine.generate([tuple(GOOD[0])], 4).tokens == wanted
    assert engine.generate(tuple(GOOD[0]), 4).tokens == wanted


@pytest.mark.parametrize(
    ("mode", "options", "says"),
    [
        ("parallel", {}, "unknown mode 'parallel'.*sequential.*chunked.*processes"),
        ("", {}, "unknown mode"),
        ("streams", {}, "'streams' cannot run on cpu here.*GPU.*These can: sequential, chunked, processes"),
        ("partitioned", {}, "cannot run on cpu"),
        ("mps", {}, "cannot run on cpu"),
        ("sequential", {"chunk_tokens": 8}, "no option 'chunk_tokens'.*prefill_tokens"),
        ("chunked", {"chunks": 8}, "no option 'chunks'.*chunk_tokens"),
        ("chunked", {"chunk_tokens": 0}, "chunk_tokens=0.*at least 1"),
        ("chunked", {"chunk_tokens": 3.5}, "chunk_tokens=3.5"),
        ("sequential", {"max_batch": -1}, "max_batch=-1"),
        ("sequential", {"prefill_tokens": "many"}, "prefill_tokens='many'"),
        ("processes", {"decode_cores": 0}, "decode_cores=0"),
    ],
)
def test_modes(engine: Engine, mode: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ModeError, match=says):
        engine.set_mode(mode, **options)
    assert engine.mode == "sequential"
    still_works(engine)
    with pytest.raises(ModeError, match=says):
        Engine.from_pretrained(tiny("llama"), mode=mode, **options)


@pytest.mark.skipif(len(cores()) < 2, reason="a single core is shared")
def test_too_many_decode_cores(engine: Engine) -> None:
    with pytest.raises(ModeError, match=rf"decode_cores={len(cores())}.*at most {len(cores()) - 1}"):
        engine.set_mode("processes", decode_cores=len(cores()))
    assert engine.mode == "sequential"
    engine.set_mode("processes", decode_cores=1)
    still_works(engine)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"device": "tpu"}, HardwareError, "'tpu'.*'cpu' or 'cuda'"),
        ({"device": "mps"}, HardwareError, "'mps'"),
        ({"dtype": "int8"}, HardwareError, "'int8'.*float32, bfloat16, float16"),
        ({"dtype": torch.float64}, HardwareError, "float64"),
        ({"kv_tokens": 0}, HardwareError, "0 tokens holds no page.*more kv_tokens"),
        ({"kv_tokens": -100}, HardwareError, "-100 tokens"),
        ({"kv_tokens": 31}, HardwareError, "31 tokens holds no page of 32"),
        ({"kv_tokens": 10**15}, HardwareError, "10{15} tokens takes .* GiB .* are free .*at most"),
        ({"page_size": 0}, HardwareError, "page_size=0"),
        ({"page_size": -4}, HardwareError, "page_size=-4"),
        ({"decode_cores": 1}, ModeError, "no option 'decode_cores'"),
    ],
    ids=str,
)
def test_engines(settings: dict[str, Any], error: type[Exception], says: str, no_process_left: None) -> None:
    with pytest.raises(error, match=says):
        Engine.from_pretrained(tiny("llama"), **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_no_gpu(device: str) -> None:
    with pytest.raises(HardwareError, match=f"'{device}' is not there.*device='cpu'"):
        Engine.from_pretrained(tiny("llama"), device=device)


def test_modes_are_checked_before_anything_is_loaded() -> None:
    """A typing mistake must not cost the loading of a large model."""
    with pytest.raises(ModeError):
        Engine.from_pretrained("/nowhere/at/all", mode="sequentail")


def test_the_pool_has_the_capacity_asked_for() -> None:
    with Engine.from_pretrained(tiny("llama"), kv_tokens=100, page_size=16) as engine:
        assert (engine.pool.pages, engine.pool.tokens) == (6, 96)
    with Engine.from_pretrained(build("llama")) as engine:
        assert engine.pool.tokens >= engine.config.context, "by default a request of full length fits"


def test_after_close(no_process_left: None) -> None:
    engine = Engine.from_pretrained(tiny("llama"), kv_tokens=256)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.generate([1]),
        lambda: engine.submit([1]),
        lambda: engine.run(),
        lambda: next(engine.stream([1])),
        lambda: engine.serve(None),
        lambda: engine.set_mode("chunked"),
    ):
        with pytest.raises(SplitwiserError, match=r"closed.*Engine\.from_pretrained"):
            call()
    assert repr(engine) == "Engine(closed)"


def test_a_closed_engine_says_so_when_asked_for_its_pool(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.close()
    with pytest.raises(SplitwiserError, match="closed"):
        _ = engine.kv_use


def test_a_timeline_of_the_last_part_of_a_run_keeps_the_clock_it_is_given(engine: Engine) -> None:
    origin = time.perf_counter()
    engine.generate(prompts_of(12), 6)
    middle = time.perf_counter()
    engine.set_mode("chunked")
    request = engine.submit(prompts_of(12, seed=1)[0], max_new_tokens=6)
    engine.run()
    whole, last = engine.timeline(origin), engine.timeline(middle, [request], origin)
    assert last.spans == tuple(span for span in whole.spans if span.end >= middle - origin)
    assert {span.mode for span in last.spans} == {"chunked"}
    assert last.requests[0].arrival > middle - origin
    assert [change.mode for change in last.modes] == ["sequential", "chunked"]
    assert last.modes[0].time == pytest.approx(middle - origin) and last.modes[1].time > middle - origin
