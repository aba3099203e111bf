"""Models that cannot be split, memory that does not suffice, processes that die: clear errors, nothing left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from pipeline_models import model_of
from tiny_models import VOCAB, generated, prompts_of

from splitwiser_lab import HardwareError, HuggingFacePipeline, LaneError, ModelError, SplitwiserError
from splitwiser_lab.pipelines.kv import KVLayout
from splitwiser_lab.pipelines.memory import MemoryNeed, need
from splitwiser_lab.pipelines.phases import Phases

pytestmark = pytest.mark.timeout(180)
PROMPTS = prompts_of(*[30] * 8)


# -- models


def mamba() -> transformers.PreTrainedModel:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config)


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=48, num_layers=2, d_kv=8, num_heads=6, d_ff=80)
    return transformers.T5ForConditionalGeneration(config)


def gpt1() -> transformers.PreTrainedModel:
    config = transformers.OpenAIGPTConfig(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=6, n_positions=64)
    return transformers.OpenAIGPTLMHeadModel(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (mamba, "MambaForCausalLM cannot be split.*past_key_values|MambaForCausalLM cannot be split.*LinearAttention"),
        (t5, "T5ForConditionalGeneration cannot be split.*encoder-decoder"),
        (gpt1, "OpenAIGPTLMHeadModel cannot be split.*past_key_values"),
    ],
    ids=["state space", "encoder-decoder", "no cache"],
)
def test_models_without_a_kv_cache_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        HuggingFacePipeline.from_pretrained(make().eval())


def test_a_model_that_leaves_the_cache_empty_is_refused() -> None:
    class Forgetful(transformers.LlamaForCausalLM):
        def forward(self, input_ids, past_key_values=None, use_cache=True):
            return super().forward(input_ids, use_cache=False)

    with pytest.raises(ModelError, match=r"Forgetful cannot be split.*left no key and value"):
        HuggingFacePipeline.from_pretrained(Forgetful(model_of("llama").config).eval())


def test_a_folder_of_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    t5().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"encoder-decoder \(t5\)"):
        HuggingFacePipeline.from_pretrained(tmp_path)


def test_what_is_not_a_model_or_of_another_dtype_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot use a dict"):
        HuggingFacePipeline.from_pretrained({})
    with pytest.raises(HardwareError, match="is in float32, not bfloat16"):
        HuggingFacePipeline.from_pretrained(model_of("llama"), dtype="bfloat16")


def test_a_model_that_cannot_be_sent_says_so() -> None:
    class Local(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(ModelError, match=r"Local cannot be sent to another process.*module that can be imported"):
        HuggingFacePipeline.from_pretrained(Local(model_of("llama").config).eval())


# -- memory


def test_the_sum_is_shown_when_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    with HuggingFacePipeline.from_pretrained(model_of("llama"), mode="replicas", processes=8) as made:
        monkeypatch.setattr("splitwiser_lab.pipelines.huggingface.settled_free_bytes", lambda device: 2**30)
        with pytest.raises(HardwareError, match=r"8 × \(0.34 GiB process .*= 2.74 GiB, and 1.00 GiB .* at most 2 proc"):
            made.generate(PROMPTS, 4)
        assert not made.pids
        made.set_mode("replicas", 2)
        assert made.generate(PROMPTS, 4).metrics.completed == len(PROMPTS)


def test_the_need_counts_every_process_and_the_slots_once() -> None:
    layout = KVLayout(((4, 64, 64),) * 10, torch.float16)
    config = model_of("llama").config
    one, four = (need(n, False, layout, config, "cpu", 8, (100, 150)) for n in (1, 4))
    assert four.total == 4 * one.total
    assert one.cache == 2 * 10 * 8 * 4 * 64 * 150 * 2
    split = need(2, True, layout, config, "cpu", 8, (100, 150))
    assert split.slots == 2 * 2 * 10 * 8 * 4 * 64 * 100 * 2
    split.check(split.total)
    with pytest.raises(HardwareError, match="a smaller batch"):
        split.check(split.total - 1)
    with pytest.raises(HardwareError) as caught:
        MemoryNeed(2, 100, 0, 0, 50).check(40)
    assert "at most" not in str(caught.value), "not even one fits"


# -- processes


def shared_memory() -> int:
    """Anonymous files of ours that this process holds open or maps."""
    fds = sum("splitwiser" in _target(fd) for fd in Path("/proc/self/fd").iterdir())
    return fds + sum("splitwiser" in line for line in Path("/proc/self/maps").read_text().splitlines())


def _target(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:
        return ""


def check_works(made: HuggingFacePipeline) -> None:
    assert made.generate(PROMPTS[:3], 4, batch_size=2).tokens == [
        generated(model_of("llama"), prompt, 4) for prompt in PROMPTS[:3]
    ]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux shows what a process holds")
def test_a_killed_worker_is_named_and_the_next_run_works(no_process_left: None) -> None:
    gc.collect()
    before = shared_memory()
    made = HuggingFacePipeline.from_pretrained(model_of("llama"))
    for mode, victim in (("replicas", "process 1"), ("split", "decode")):
        made.set_mode(mode)
        made.generate(PROMPTS, 200, batch_size=1)
        pids = made.pids
        os.kill(pids[victim], signal.SIGSTOP)  # so that a job is surely under way in it when it dies
        killer = threading.Timer(0.3, os.kill, (pids[victim], signal.SIGKILL))
        killer.start()
        with pytest.raises(LaneError, match=rf"process '{victim}'.*pid {pids[victim]}.*SIGKILL.*batch is lost"):
            made.generate(PROMPTS, 200, batch_size=1)
        killer.join()
        assert not any(psutil.pid_exists(pid) for pid in pids.values()), "the others have ended, too"
        check_works(made)
    os.kill(made.pids["decode"], signal.SIGKILL)  # between two runs
    psutil.Process(made.pids["decode"]).wait(10)
    check_works(made)
    made.close()
    made.close()
    gc.collect()
    assert shared_memory() == before
    with pytest.raises(SplitwiserError, match="closed"):
        made.generate(PROMPTS, 4)


def test_a_batch_that_fails_comes_with_its_traceback() -> None:
    with HuggingFacePipeline.from_pretrained(model_of("llama"), mode="split") as made:
        for request in (bad := made._requests(_Fixed([1, 2, 3]))):
            request.prompt = [10**6]  # past the door, as a model's own error would come
        with pytest.raises(LaneError, match=r"process 'prefill'(?s:.*)IndexError"):
            made._run(bad, 1)
        assert not made.pids
        check_works(made)


class _Fixed:
    """A workload of one prompt."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt, self.arrival_s, self.max_new_tokens, self.ignore_eos = prompt, 0.0, 3, True

    def requests(self, **_: int) -> list[_Fixed]:
        return [self]


def test_an_interrupt_ends_the_run_and_its_processes(no_process_left: None) -> None:
    with HuggingFacePipeline.from_pretrained(model_of("llama"), mode="split") as made:
        made.generate(PROMPTS, 200, batch_size=1)
        pids, started = made.pids, time.monotonic()
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)  # else a fast machine might be done before
        resume = threading.Timer(0.4, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids.values()])
        timer.start()
        resume.start()
        with pytest.raises(KeyboardInterrupt):
            made.generate(PROMPTS, 200, batch_size=1)
        resume.join()
        assert time.monotonic() - started < 30
        assert not any(psutil.pid_exists(pid) for pid in pids.values())
        check_works(made)


def test_workers_end_with_a_killed_parent() -> None:
    program = (
        "import sys, time; sys.path[:0] = ['tests', 'tests/pipelines']\n"
        "from pipeline_models import model_of\n"
        "from splitwiser_lab import HuggingFacePipeline\n"
        "made = HuggingFacePipeline.from_pretrained(model_of('llama'), mode='split')\n"
        "made.generate([[1, 2, 3]], 3)\n"
        "print(*made.pids.values(), flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_phases_ask_for_one_row_of_logits_and_give_no_needless_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitwiser_lab.pipelines.phases import PromptBatch

    model, seen = model_of("llama"), []
    forward = model.forward

    def listen(**given):
        seen.append(given)
        return forward(**given)

    phases = Phases(model)
    monkeypatch.setattr(model, "forward", listen)
    for prompts in (((1, 2, 3), (4, 5, 6)), ((1, 2, 3), (4,))):
        batch = PromptBatch(0, prompts, (3, 3), (frozenset(),) * 2)
        tokens, cache = phases.prefill(batch)
        list(phases.decode(batch, cache, tokens.tolist()))
    assert all(given["logits_to_keep"] == 1 for given in seen)
    assert [given["attention_mask"] is None for given in seen] == [True] * 3 + [False] * 3
    assert seen[3]["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]], "padding is on the left"
    assert seen[5]["position_ids"].tolist() == [[4], [2]]
