"""The Triton kernels without a GPU: Triton's interpreter runs them on a CPU, block by block, in NumPy.

It says that they compute what PyTorch's own operations compute, reading and writing where they should. It does not
say that they compile, nor anything about bfloat16, which it cannot multiply: tests/gpu does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton (Linux only): make test-kernels",
)


@pytest.fixture(scope="module")
def found() -> Any:
    """What the interpreter computed, in a process that is told to use it before Triton is loaded."""
    script = Path(__file__).with_name("interpreted.py")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "least"), [("float32, sm_90", 1e-5), ("float16, sm_90", 2e-3), ("float16, sm_75", 2e-3)]
)
def test_attention_over_pages_is_that_of_pytorch(found: Any, case: str, least: float) -> None:
    """Ragged decode in parts that are merged, and prompts that begin anywhere; with matrix units and without."""
    assert found["attention"][case] < least


def test_a_forward_pass_is_that_of_the_plain_transformer(found: Any) -> None:
    """Norms, rotation, both kinds of attention, gates, and tokens that never leave the device, in padded batches."""
    model = found["model"]
    assert model["logits"] < 1e-4 and model["pool"] < 1e-4
    assert model["tokens"] == [True, True, True]
    assert model["padding_writes_nothing"]


def test_logits_with_a_nan_name_no_token(found: Any) -> None:
    """And what ran ahead on the device looks up a token that exists."""
    assert found["nan"] == {"picked": True, "resolved": True}
