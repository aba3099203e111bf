"""What the notebook about vLLM shows: a recorded reproduction, and sums of memory that need no vLLM."""

from __future__ import annotations

from typing import Any

from splitwiser_lab.errors import RecordingError
from splitwiser_lab.measure import shipped
from splitwiser_lab.measure.peers import find_vllm
from splitwiser_lab.pipelines.document import Reproduction
from splitwiser_lab.pipelines.vllm.memory import Work, kv_budget
from splitwiser_lab.pipelines.vllm.placement import VllmPlacement
from splitwiser_lab.pipelines.vllm.source import load_vllm_model

_RECORDING = "recordings/cpu/reproduce-vllm.json"
_HAND_OFF = {  # heading -> (figure, factor)
    "handed over MB": ("hand_off_bytes", 1e-6),
    "written in ms": ("hand_off_write_ms", 1.0),
    "waited for decode ms": ("hand_off_wait_ms", 1.0),
    "read in ms": ("hand_off_load_ms", 1.0),
}


def vllm_here() -> str | None:
    """A Python that has vLLM, or None."""
    return find_vllm()


def recorded() -> Reproduction:
    """The reproduction that was recorded on a CPU. Raises RecordingError when it is missing or damaged."""
    path = shipped.find(_RECORDING)
    if path is None:
        raise RecordingError(
            f"data/{_RECORDING} is missing: make it by `splitwiser-lab reproduce --pipeline vllm --json FILE`."
        )
    return Reproduction.load(path)


def figures(document: Reproduction, name: str) -> dict[str, float]:
    """One figure of every way to run vLLM that has it; `generate` and this package's engine are left out."""
    rows = ((row.name, row.figure(name)) for row in document.rows if row.mode in ("sequential", "replicas", "split"))
    return {row: value for row, value in rows if value is not None}


def hand_off_rows(document: Reproduction) -> list[dict[str, Any]]:
    """For a table: what one request's hand-off took with each connector, medians over requests and rounds."""
    return [
        {
            "": row.name,
            **{heading: factor * (row.figure(figure) or 0.0) for heading, (figure, factor) in _HAND_OFF.items()},
        }
        for row in document.rows
        if row.mode == "split"
    ]


def kv_share(model: str, engines: int, free: int, requests: int, tokens: int) -> dict[str, Any]:
    """For a table: the KV cache of each of `engines` with `free` bytes, for requests of so many tokens at once.

    Raises HardwareError, with the sum, where they do not fit.
    """
    known = load_vllm_model(model, "cpu", "float32")
    work = Work(tokens // 2, tokens, requests, requests)
    budget = kv_budget(VllmPlacement.of("replicas", engines), known, "cpu", work, free, free)
    held = budget.kv_bytes[0] // known.kv_token_bytes
    return {
        "engines": str(engines),
        "KV cache of each, GB": budget.kv_bytes[0] / 1e9,
        "tokens in each": float(held),
        "tokens in all": float(held * engines),
        "whole requests in all": float(engines * (held // tokens)),
    }
