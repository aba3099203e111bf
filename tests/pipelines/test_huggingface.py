"""The Hugging Face pipeline in every mode: tokens of `generate`, and a timeline that adds up."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from select import select

import psutil
import pytest
from pipeline_models import FAMILIES, model_of
from tiny_models import build, expected, generated, prompts_of
from transformers import PreTrainedModel

from splitwiser_lab import HuggingFacePipeline, ModeError, RequestError, Workload
from splitwiser_lab.hardware import cores

pytestmark = pytest.mark.timeout(180)
PLACEMENTS = [("sequential", 1), ("replicas", 2), ("split", 2)]
PROMPTS = prompts_of(40, 12, 25, 60, 33, 20, 7)
NEW = 12


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A model that ends with the first token of prompt 0, and at the latest with the fifth of prompt 1."""
    model = build("llama")
    model.generation_config.eos_token_id = [
        expected("llama", PROMPTS, NEW)[0][0],
        expected("llama", PROMPTS, NEW)[1][4],
    ]
    return model


@pytest.fixture(scope="module")
def pipeline(llama: PreTrainedModel) -> Iterator[HuggingFacePipeline]:
    """One over llama for all tests that only use it."""
    with HuggingFacePipeline.from_pretrained(llama) as made:
        yield made


@pytest.fixture(scope="module", params=PLACEMENTS, ids=lambda placement: placement[0])
def placed(request: pytest.FixtureRequest, pipeline: HuggingFacePipeline) -> Iterator[HuggingFacePipeline]:
    """The same weights in each mode, with processes of its own that start once."""
    with pipeline.beside(*request.param) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str, no_process_left: None) -> None:
    """Padded batches, a last batch that is smaller, and prompts of equal lengths that get no padding."""
    model, equal = model_of(family), prompts_of(16, 16, 16, seed=1)
    wanted = [generated(model, prompt, NEW) for prompt in PROMPTS + equal]
    assert sum(len(set(tokens)) for tokens in wanted) > 0.3 * NEW * len(wanted), "loops would hide mistakes"
    with HuggingFacePipeline.from_pretrained(model) as made:
        for mode, processes in PLACEMENTS:
            made.set_mode(mode, processes)
            result = made.generate(PROMPTS, NEW, batch_size=2)
            assert result.tokens == wanted[: len(PROMPTS)], f"{mode}, padded"
            assert result.padding > 0
            result = made.generate(equal, NEW, batch_size=3)
            assert result.tokens == wanted[len(PROMPTS) :], f"{mode}, not padded"
            assert result.padding == 0


@pytest.mark.parametrize("mode", ["replicas", "split"])
def test_more_processes_than_cores(pipeline: HuggingFacePipeline, mode: str) -> None:
    count = len(cores()) + 1
    if count > 4:
        pytest.skip("so many processes would only take time")
    pipeline.set_mode(mode, count)
    result = pipeline.generate(PROMPTS, NEW, batch_size=1, ignore_eos=True)
    assert result.tokens == [generated(model_of("llama"), prompt, NEW) for prompt in PROMPTS]
    assert len(pipeline.pids) == len(result.timeline.lanes) == count


def test_sliding_windows_are_handed_over() -> None:
    """A layer that has dropped old keys must still know the position of its next token."""
    model = build("mistral", sliding_window=16)
    with HuggingFacePipeline.from_pretrained(model, mode="split") as made:
        prompts = prompts_of(40, 40, 5, 11)
        result = made.generate(prompts, 30, batch_size=2)
        assert result.tokens == [generated(model, prompt, 30) for prompt in prompts]


def test_the_given_model_is_not_touched() -> None:
    model = build("llama")
    before = {name: (tensor.data_ptr(), tensor.sum().item()) for name, tensor in model.state_dict().items()}
    with HuggingFacePipeline.from_pretrained(model) as made:
        made.generate(PROMPTS[:1], 2)
        own = made.model()
        assert generated(own, PROMPTS[0], NEW) == generated(model, PROMPTS[0], NEW)
        shared = {tensor.data_ptr() for tensor in own.state_dict().values()}
        assert shared == {tensor.data_ptr() for tensor in made.model().state_dict().values()}, "there is one copy"
    assert before == {name: (tensor.data_ptr(), tensor.sum().item()) for name, tensor in model.state_dict().items()}


# -- ends, arrivals


def test_rows_end_on_their_own(placed: HuggingFacePipeline, llama: PreTrainedModel) -> None:
    """An end-of-sequence token ends its row and no other; a row that ends in prefill is never handed over."""
    free, prompts = expected("llama", PROMPTS[:4], NEW), PROMPTS[:4]
    wanted = [generated(llama, prompt, NEW, pad_token_id=0) for prompt in prompts]
    assert wanted[0] == free[0][:1] and len(wanted[1]) < NEW
    for batch_size in (1, 4):
        result = placed.generate(prompts, NEW, batch_size=batch_size)
        assert result.tokens == wanted
        assert [request.finish_reason for request in result.requests][:2] == ["stop", "stop"]
        assert placed.generate(prompts, NEW, ignore_eos=True, batch_size=batch_size).tokens == free
        assert placed.generate(prompts, 1, batch_size=batch_size).tokens == [tokens[:1] for tokens in free]


def test_each_request_gets_its_own_number_of_tokens(placed: HuggingFacePipeline) -> None:
    arrivals = Workload.poisson(50.0, requests=5, prompt_tokens=20, output_tokens=4, seed=3)
    varied = Workload.azure("conv", requests=5, seed=1).scaled(0.01)
    for workload in (arrivals, varied):
        result = placed.run(workload, batch_size=2)
        due = workload.requests(placed.facts.vocab_size, placed.facts.context)
        assert [len(tokens) for tokens in result.tokens] == [item.max_new_tokens for item in due]
        assert result.tokens == [generated(model_of("llama"), item.prompt, item.max_new_tokens) for item in due]
        for request in result.timeline.requests:
            assert request.scheduled is not None and request.scheduled >= request.arrival


# -- what is reported


def test_the_timeline_adds_up(placed: HuggingFacePipeline) -> None:
    workload = Workload.closed(PROMPTS, output_tokens=NEW, ignore_eos=True)
    placed.start(workload, batch_size=2)
    result = placed.run(workload, batch_size=2)
    spans, metrics = result.timeline.spans, result.metrics
    assert metrics.completed == len(PROMPTS) and metrics.total_output_tokens == NEW * len(PROMPTS)
    assert sum(span.prefill_tokens for span in spans) == sum(map(len, PROMPTS))
    assert sum(span.decode_tokens for span in spans) == (NEW - 1) * len(PROMPTS)
    assert all(0 <= span.start < span.end <= result.timeline.duration for span in spans)
    for lane in result.timeline.lanes:
        own = sorted((span for span in spans if span.lane == lane), key=lambda span: span.start)
        assert all(a.end <= b.start for a, b in pairwise(own)), "one batch at a time in a process"
    assert result.spawn_s == (), "the processes ran already"
    figures = result.figures()
    assert figures["output_throughput"] == metrics.output_throughput
    steady = result.steady
    assert steady is not None or placed.placement.processes > 1, "so short a run may have no window of two batches"
    if steady is not None:
        assert 0 <= steady.start < steady.end <= result.timeline.duration


def test_split_hands_over_and_overlaps(pipeline: HuggingFacePipeline) -> None:
    pipeline.set_mode("split")
    prompts = prompts_of(*[100] * 8)
    result = pipeline.generate(prompts, 30, batch_size=2, ignore_eos=True)
    assert result.timeline.lanes == ("prefill", "decode")
    assert len(result.spawn_s) == 2 and min(result.spawn_s) > 0
    assert pipeline.spawn_s == result.spawn_s
    assert {span.phase for span in result.timeline.spans if span.lane == "prefill"} == {"prefill"}
    assert [h.batch for h in result.hand_offs] == [0, 1, 2, 3]
    heads, dim, layers, rows, itemsize = 2, 8, 2, 2, 4
    assert {h.nbytes for h in result.hand_offs} == {2 * layers * rows * heads * 100 * dim * itemsize}
    assert all(h.write_s > 0 and h.wait_s > 0 for h in result.hand_offs)
    assert result.figures()["overlap_seconds"] > 0, "batch k + 1 is prefilled while batch k is decoded"
    for request in result.timeline.requests:
        assert request.token_times[0] < request.hand_off < request.token_times[1]


def test_replicas_take_equal_shards(pipeline: HuggingFacePipeline) -> None:
    pipeline.set_mode("replicas", 2)
    result = pipeline.generate(PROMPTS, NEW, batch_size=2)
    assert result.timeline.lanes and not result.hand_offs
    counts = {lane: 0 for lane in result.timeline.lanes}
    for span in result.timeline.spans:
        counts[span.lane] += span.sequences if span.phase == "prefill" else 0
    assert sorted(counts.values()) == [3, 4]


def test_processes_can_be_launched_and_awaited_later(pipeline: HuggingFacePipeline) -> None:
    pipeline.set_mode("split")
    work = Workload.closed(PROMPTS, output_tokens=NEW)
    pipeline.launch(work, batch_size=2)
    pids = pipeline.pids
    assert len(pids) == 2 and not pipeline.spawn_s, "nobody has waited for them"
    assert select(_connections(pipeline), [], [], 60)[0], "one tells that it is ready"
    result = pipeline.generate(PROMPTS, NEW, batch_size=2, ignore_eos=True)
    assert result.tokens == expected("llama", PROMPTS, NEW)
    assert pipeline.pids == pids and not result.spawn_s and len(pipeline.spawn_s) == 2


def _connections(pipeline: HuggingFacePipeline) -> list[Connection]:
    assert pipeline._team is not None
    return [child.connection for child in pipeline._team._children.values()]


def test_processes_run_on_until_the_mode_changes(pipeline: HuggingFacePipeline) -> None:
    pipeline.set_mode("replicas", 2)
    pipeline.generate(PROMPTS, NEW)
    pids = pipeline.pids
    assert not pipeline.generate(PROMPTS, NEW).spawn_s and pipeline.pids == pids
    pipeline.set_mode("sequential")
    pipeline.generate(PROMPTS[:1], 2)
    assert len(pipeline.pids) == 1 and not any(psutil.pid_exists(pid) for pid in pids.values())


# -- at the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "threads"}, "no mode 'threads': use sequential, replicas, split"),
        ({"mode": "sequential", "processes": 2}, "sequential runs in one process, not 2"),
        ({"mode": "split", "processes": 1}, "split needs 2 processes"),
        ({"mode": "replicas", "processes": 0}, "processes=0"),
        ({"mode": "split", "sm_shares": [75, 25]}, "add mps=True"),
        ({"mode": "split", "mps": True, "sm_shares": [75]}, "give 2 percentages"),
        ({"mode": "split", "mps": True, "sm_shares": [75, 0]}, "from 1 to 100"),
        ({"mode": "split", "mps": True}, "mps=True cannot run on cpu: .*this device is a CPU"),
    ],
)
def test_placements_that_cannot_be(pipeline: HuggingFacePipeline, options: dict[str, object], message: str) -> None:
    before = pipeline.placement
    with pytest.raises(ModeError, match=message):
        pipeline.set_mode(**options)
    assert pipeline.placement == before


def test_requests_that_cannot_be_served(pipeline: HuggingFacePipeline) -> None:
    for prompts, options, message in (
        ([], {}, "no prompts"),
        ([[]], {}, "empty"),
        ([[10**6]], {}, "outside the vocabulary"),
        ([[1] * 250], {"max_new_tokens": 10}, "more than the model's context"),
        (["text"], {}, "no tokenizer"),
        ([[1]], {"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(RequestError, match=message):
            pipeline.generate(prompts, **options)
    assert pipeline.generate([[1, 2]], 2).metrics.completed == 1
