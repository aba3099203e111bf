"""What the commands share: the app, consoles, options, and ways to show what was measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from splitwiser_lab.errors import SplitwiserError

if TYPE_CHECKING:
    from splitwiser_lab.measure.compare import Comparison
    from splitwiser_lab.measure.workload import Workload

app = typer.Typer(
    help="Split an LLM's prefill and decode onto one device, flip the mechanism, trust the numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 150)
notices = Console(stderr=True)

Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
Model = Annotated[str, typer.Option(help="Alias, local folder, or Hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Repeats = Annotated[int, typer.Option(help="Interleaved rounds.")]
Modes = Annotated[str, typer.Option(help="Comma-separated, options after colons; empty: all that run here.")]
Kind = Annotated[str, typer.Option(help="closed, poisson, conv, code, paper-hf, paper-vllm, or a CSV.")]
Requests = Annotated[int, typer.Option(help="How many.")]
Rate = Annotated[float, typer.Option(help="Requests per second, for those with arrivals.")]
PromptTokens = Annotated[int, typer.Option(help="Prompt length (closed, poisson).")]
OutputTokens = Annotated[int, typer.Option(help="Output length (closed, poisson).")]
Scale = Annotated[float, typer.Option(help="Multiply the lengths of a trace, so that small machines can run it.")]
KvTokens = Annotated[int | None, typer.Option(help="Capacity of the KV pool; none: from free memory.")]


def shortened(prompt: str, most: int = 160) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(prompt.split())
    return line if len(line) <= most else line[:most] + " ..."


def workload_of(kind: str, requests: int, rate: float, prompt: int, output: int, scale: float) -> Workload:
    """The workload that the options ask for. Raises WorkloadError."""
    from splitwiser_lab.measure.workload import Workload

    if kind == "closed":
        return Workload.closed(requests, prompt_tokens=prompt, output_tokens=output)
    if kind == "poisson":
        return Workload.poisson(rate, requests=requests, prompt_tokens=prompt, output_tokens=output)
    if kind == "conv":
        return Workload.azure("conv", rate=rate, requests=requests).scaled(scale)
    if kind == "code":
        return Workload.azure("code", rate=rate, requests=requests).scaled(scale)
    if kind in ("paper-hf", "paper-vllm"):
        return Workload.paper("hf" if kind == "paper-hf" else "vllm", requests=requests).scaled(scale)
    return Workload.from_csv(kind, requests=requests).scaled(scale)


def named_modes(modes: str) -> list[str] | None:
    """The modes of a comma-separated list, or None when it is empty."""
    return [mode.strip() for mode in modes.split(",") if mode.strip()] or None


def show(found: Comparison, json_file: Path | None) -> None:
    """Print a comparison and what differed, and write it if asked to."""
    console.print(found.table())
    for run in found.runs:
        for difference in run.differences:
            console.print(f"{run.mode}: {difference}", markup=False, highlight=False)
    if json_file:
        found.to_json(json_file)


def judge(found: Comparison) -> None:
    """End with an error when a token differs and half precision does not explain it."""
    wrong = [run.mode for run in found.runs if not all(c.explained for checks in run.checks for c in checks)]
    if wrong:
        raise SplitwiserError(
            f"tokens differ from the reference in {', '.join(wrong)}, and precision does not explain it."
        )


@contextmanager
def progress() -> Iterator[Any]:
    """A line on stderr that says what is going on: a live one in a terminal, plain lines elsewhere."""
    if notices.is_terminal:
        with notices.status("starting ...") as status:
            yield status.update
    else:
        yield lambda message: notices.print(message, markup=False, highlight=False)
