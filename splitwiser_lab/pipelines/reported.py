"""What has been reported of Splitwiser (Aali, Cardoza, Capo, arXiv 2505.03763), and what is not known about it.

The figures are second-hand: public summaries of the paper, which give no table and no full setup. What the setup may
have been is read from the code that its authors published. Nothing here was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "Aali, Cardoza, Capo: Splitwiser, arXiv 2505.03763"
HF_CODE = "github.com/asad-aali/splitwiser"
VLLM_CODE = "github.com/adney11/vllm-sysml"
_LENS = f"{PAPER}, as summarised by arxivlens.com"
_DIGEST = f"{PAPER}, as summarised by digest.lyk-ai.com"


def as_gain(saved: float) -> float:
    """The multiple of throughput that a share of latency saved amounts to, for the same work: 0.2 saved is 1.25."""
    return 1 / (1 - saved)


@dataclass(frozen=True)
class Claim:
    """One reported figure, and which rows of a reproduction are the nearest to it.

    `gain` is the figure as a multiple of taking turns. `pipeline`, `modes`, `processes` and `figure` choose the rows
    and the figure to lay beside it; empty or None: not told, so that any may be meant.
    """

    said: str
    gain: float
    setup: str
    unknown: str
    source: str
    pipeline: str = ""
    modes: tuple[str, ...] = ("replicas", "split")
    processes: int | None = None
    figure: str = "output_throughput"


CLAIMS = (
    Claim(
        "latency −17.6 %",
        as_gain(0.176),
        "Hugging Face pipeline on an A100, against sequential inference",
        "model, batch, lengths, number of processes, MPS or not, which latency, repeats. The published script runs two "
        "processes with batches of 20 in float16, pads on the right, and starts its timer before the processes.",
        f"{_LENS}; {HF_CODE}",
        "hf",
        processes=2,
    ),
    Claim(
        "latency up to −18.2 %",
        as_gain(0.182),
        "Hugging Face or vLLM pipeline",
        "pipeline, GPU, model, batch, lengths, number of processes, MPS or not: the best of several.",
        _DIGEST,
    ),
    Claim(
        "throughput up to 1.42 ×",
        1.42,
        "Hugging Face or vLLM pipeline",
        "pipeline, GPU, model, number of processes, MPS or not: the best of several.",
        _DIGEST,
    ),
    Claim(
        "steady-state throughput 1.1 ×",
        1.1,
        "4 processes in parallel, against sequential inference",
        "pipeline (the published vLLM code runs 1, 2, 4 and 8 engines), GPU, model, lengths, how the steady state is "
        "cut out, repeats.",
        f"{_LENS}; {VLLM_CODE}",
        processes=4,
        figure="steady_output_throughput",
    ),
)
