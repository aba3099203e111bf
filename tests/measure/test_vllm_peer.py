"""What vLLM is told beside our engine, and how it ends, with a module in its place that notes what it is told."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from splitwiser_lab.measure import vllm_peer
from splitwiser_lab.measure.vllm_peer import VllmPeer, has_compiler, settings_of

FAKE = """
import json, os, subprocess, sys

__version__ = "9.9"


class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.max_tokens = max_tokens


class Output:
    def __init__(self, tokens):
        self.token_ids, self.outputs = tokens, [self]


class LLM:
    def __init__(self, **told):
        engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
        seen = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "CUDA_"))}
        with open(os.environ["FAKE_SAYS"], "w") as file:
            json.dump({"told": told, "environment": seen, "engine": engine.pid}, file)
        print("a progress bar" * 20_000, file=sys.stderr)

    def generate(self, prompts, sampling, use_tqdm):
        if sampling.max_tokens > 100:
            sys.exit("it is out of memory")
        return [Output(prompt["prompt_token_ids"][:1] * sampling.max_tokens) for prompt in prompts]
"""


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "vllm.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_SAYS", str(tmp_path / "says.json"))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setattr(vllm_peer, "_END_SECONDS", 1.0)
    monkeypatch.setattr(vllm_peer, "_memory_share", lambda device, kv_bytes: 0.62)
    monkeypatch.setattr("splitwiser_lab.lanes.support.index_of", lambda device: device.index or 0)
    return tmp_path / "says.json"


def has_ended(pid: int) -> bool:
    """Whether nothing of it runs; whoever inherits it may not have taken note yet."""
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def start(device: str, tmp_path: Path, kv_bytes: int | None = None, wait: bool = True) -> VllmPeer:
    return VllmPeer(sys.executable, "bfloat16", device, 2048, tmp_path, kv_bytes, wait)


def test_on_a_gpu_only_memory_and_the_prefix_cache_are_not_the_default(says: Path, tmp_path: Path) -> None:
    peer = start("cuda", tmp_path)
    try:
        found = json.loads(says.read_text())
        assert peer.run([[5, 6], [7, 8]], 3)[1] == [[5, 5, 5], [7, 7, 7]]
        assert peer.profile([[5]], 1)[1] == [], "its engine is in another process"
    finally:
        peer.close()
    assert found["told"] == {
        "model": str(tmp_path),
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "enforce_eager": False,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.62,
    }
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in found["environment"]
    assert peer.name == "vLLM 9.9" and peer.settings.startswith("defaults;") and "62% of the GPU" in peer.settings
    assert has_ended(found["engine"]), "what it leaves behind is ended"


def test_a_cache_of_a_given_size_needs_no_measuring(says: Path, tmp_path: Path) -> None:
    start("cuda:1", tmp_path, 5 << 20).close()
    found = json.loads(says.read_text())
    assert (found["told"]["kv_cache_memory_bytes"], found["told"]["gpu_memory_utilization"]) == (5 << 20, 0.62)
    assert found["environment"]["CUDA_VISIBLE_DEVICES"] == "1", "it would take the first"


@pytest.mark.parametrize(
    ("free", "kv_bytes", "share"), [(80, None, 0.68), (80, 5, 0.1), (4, 5, 0.034), (80, 0.1, 0.01)]
)
def test_the_share_of_the_memory_is_what_must_be_free(
    monkeypatch: pytest.MonkeyPatch, free: float, kv_bytes: float | None, share: float
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 100 * 2**30))
    given = None if kv_bytes is None else int(kv_bytes * 2**30)
    assert vllm_peer._memory_share("cuda", given) == pytest.approx(share, abs=1e-3)


def test_one_that_still_starts_is_ended_at_once(says: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import time; time.sleep(60)")
    peer = start("cpu", tmp_path, wait=False)
    pid, begun = peer._process.pid, time.monotonic()
    peer.close()
    assert has_ended(pid) and time.monotonic() - begun < 10


def test_on_a_cpu_it_is_compiled_where_there_is_a_compiler_and_says_so_where_not(
    says: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for compiler in (True, False):
        monkeypatch.setattr(vllm_peer, "has_compiler", lambda compiler=compiler: compiler)
        peer = start("cpu", tmp_path)
        peer.close()
        found = json.loads(says.read_text())
        assert found["told"]["enforce_eager"] is not compiler
        assert found["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        names.append((peer.name, peer.settings.split(",")[0]))
    assert names == [("vLLM 9.9", "compiled"), ("vLLM 9.9, eager", "eager")]


def test_a_python_that_is_not_there_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^vLLM's Python 'no-python' cannot be started: No such file"):
        VllmPeer(str(tmp_path / "no-python"), "float32", "cpu", 64, tmp_path)


def test_its_last_words_are_told_when_it_ends(says: Path, tmp_path: Path) -> None:
    peer = start("cpu", tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="vLLM ended: it is out of memory"):
                peer.run([[1]], 101)
    finally:
        peer.close()
    assert has_ended(json.loads(says.read_text())["engine"])


def test_vllm_says_what_is_not_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    order: dict[str, Any] = {"cpu": True, "eager": False, "max_model_len": 2048, "memory_share": None}
    order["kv_bytes"] = None
    assert settings_of(order).startswith("compiled") and "in one process" in settings_of(order)
    assert settings_of({**order, "eager": True}).startswith("eager, since")
    given = settings_of({**order, "cpu": False, "memory_share": 0.62, "kv_bytes": 3 << 30})
    assert given.startswith("defaults;") and "3.0 GiB of KV cache" in given and "62%" not in given
    gpu = settings_of({**order, "cpu": False, "memory_share": 0.62})
    assert gpu.startswith("defaults;") and "62% of the GPU's memory" in gpu and "process" not in gpu
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has_compiler()
