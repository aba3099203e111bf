"""The memory that two vLLM engines share on a real GPU; no vLLM is needed for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splitwiser_lab.pipelines.vllm import team
from splitwiser_lab.shared_memory import allocate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none"),
]

ENGINE = """
import json, sys
import torch
from splitwiser_memory import memory_of
from splitwiser_pages import Job, Pages
from splitwiser_stopwatch import stopwatch

memory = memory_of(json.loads(sys.argv[1]))
layers = [torch.arange(9 * 2 * 16 * 3 * 8, device="cuda", dtype=torch.float32).view(9, 2, 16, 3, 8) + n for n in (0, 1)]
pages = Pages(layers, 9)
with stopwatch("save", memory.on_gpu) as moved:
    moved["0"] = pages.move(Job("0", "save", [7, 2], pages.page_bytes), memory)
print(json.dumps(stopwatch.take()))
"""


def test_another_process_writes_blocks_into_the_memory_of_this_one() -> None:
    block = 2 * 16 * 3 * 8
    buffer = allocate(4 * 2 * block * 4, "cuda")
    described = json.dumps(team._described(buffer))
    side = Path(team.__file__).parent / "engine_side"
    ran = subprocess.run(
        [sys.executable, "-c", ENGINE, described], cwd=side, capture_output=True, text=True, timeout=90
    )
    assert ran.returncode == 0, ran.stderr
    ((what, nbytes, seconds, request),) = json.loads(ran.stdout)
    assert (what, nbytes, request) == ("save", 2 * 2 * block * 4, "0") and 0 < seconds < 1
    written = buffer.tensor(torch.float32, (2, 2, block), 2 * block * 4).cpu()
    whole = torch.arange(9 * block, dtype=torch.float32).view(9, block)
    assert torch.equal(written, torch.stack([whole[[7, 2]], whole[[7, 2]] + 1]))
