"""The command that runs the paper's experiments again."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from splitwiser_lab.cli.common import Device, Json, app, console, named_modes, progress, shortened
from splitwiser_lab.errors import SplitwiserError

if TYPE_CHECKING:
    from splitwiser_lab.pipelines.document import Reproduction


@app.command()
def reproduce(
    pipeline: Annotated[str, typer.Option(help="hf: the paper's Hugging Face pipeline, truly split; vllm.")] = "hf",
    scale: Annotated[
        str, typer.Option(help="small (two to three minutes on two cores) or paper (for a GPU).")
    ] = "small",
    mode: Annotated[str, typer.Option(help="replicas, split; comma-separated. Empty: as the scale has it.")] = "",
    processes: Annotated[str, typer.Option(help="Numbers of processes, comma-separated.")] = "",
    mps: Annotated[bool | None, typer.Option("--mps/--no-mps", help="Run the processes under MPS.")] = None,
    sm_shares: Annotated[str, typer.Option(help="Percent of the SMs of each process under MPS, as 50,50.")] = "",
    model: Annotated[str | None, typer.Option(help="Alias, folder, Hub id, or a shape with random weights.")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests in a batch.")] = None,
    input_tokens: Annotated[int | None, typer.Option("--input", help="Prompt length in tokens.")] = None,
    output_tokens: Annotated[str, typer.Option("--output", help="New tokens; several, comma-separated.")] = "",
    requests: Annotated[int | None, typer.Option(help="How many.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random prompts.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Device = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="vllm: no CUDA graphs, nothing compiled.")] = False,
    max_batch: Annotated[int | None, typer.Option(help="vllm: requests that each engine runs at once at most.")] = None,
    rate: Annotated[str, typer.Option(help="vllm: also one by one, so many a second; or 70% of what is served.")] = "",
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    seconds: Annotated[
        float | None, typer.Option(help="Begin nothing that would end later than this; what is left out is told.")
    ] = None,
    engine: Annotated[bool, typer.Option(help="Also run this package's engine on the same work.")] = True,
    phase_seconds: Annotated[float, typer.Option(help="How long to watch each phase alone; 0: one pass.")] = 1.0,
    start_together: Annotated[
        bool, typer.Option("--start-together", help="Start all processes side by side: faster, start s is not told.")
    ] = False,
    only_phases: Annotated[bool, typer.Option("--only-phases", help="Watch each phase alone, and no more.")] = False,
    vllm: Annotated[str | None, typer.Option(help="The Python of an environment with vLLM.")] = None,
    join: Annotated[list[Path] | None, typer.Option(help="Run nothing: join files that --json wrote.")] = None,
    json_file: Json = None,
) -> None:
    """Rerun the paper's experiment: every placement on the same work, interleaved, every token checked.

    The first round of everything comes first, and the --json file is written anew after each measurement: a run that
    is interrupted or killed leaves what it had. Where one call would take too long, give it --seconds, or run it in
    parts (`--processes 2 --no-mps --json A.json`, ...); one document of all: `reproduce --join A.json --join B.json
    --json ALL.json`.
    """
    from splitwiser_lab.pipelines.budget import Budget

    if join:
        from splitwiser_lab.pipelines.join import join_files

        _tell(join_files(join), json_file)
        return
    budget = Budget(seconds)
    if pipeline not in ("hf", "vllm"):
        raise SplitwiserError(f"no pipeline {pipeline!r} can be reproduced: use 'hf' or 'vllm'.")
    if only_phases and seconds is not None:
        raise SplitwiserError("--only-phases watches each phase for --phase-seconds: give it no --seconds.")
    from splitwiser_lab.pipelines.arrivals import Rate
    from splitwiser_lab.pipelines.experiment import EXPERIMENTS
    from splitwiser_lab.pipelines.reproduce import reproduce as run
    from splitwiser_lab.pipelines.reproduce import reproduce_phases
    from splitwiser_lab.pipelines.vllm.experiment import VLLM_EXPERIMENTS
    from splitwiser_lab.pipelines.vllm.reproduce import reproduce_vllm
    from splitwiser_lab.pipelines.vllm.settings import EngineSettings

    if scale not in EXPERIMENTS:
        raise SplitwiserError(f"unknown scale {scale!r}: use {' or '.join(EXPERIMENTS)}.")
    chosen: Any = (EXPERIMENTS if pipeline == "hf" else VLLM_EXPERIMENTS)[scale].with_knobs(
        named_modes(mode) or (),
        _numbers("processes", processes),
        mps,
        _numbers("sm-shares", sm_shares) or None,
        model=model,
        batch=batch,
        input=input_tokens,
        outputs=_numbers("output", output_tokens) or None,
        requests=requests,
        seed=seed,
        dtype=dtype,
    )
    if pipeline == "vllm":
        if only_phases:
            raise SplitwiserError("vLLM runs its phases inside one engine: --only-phases is for --pipeline hf.")
        rates = tuple(Rate.parse(word) for word in rate.split(",") if word.strip())
        chosen = replace(chosen, settings=EngineSettings(eager, max_batch), rates=rates)
    elif eager or max_batch is not None or rate:
        raise SplitwiserError(
            "--eager, --max-batch and --rate are for --pipeline vllm: the Hugging Face pipeline is always eager, its "
            "batches are as large as --batch says, and each starts when it is full."
        )
    asked = bool(mps or sm_shares)
    kept: list[Reproduction] = []  # the last of what there was

    def keep(found: Reproduction) -> None:
        kept[:] = [found]
        if json_file:
            found.to_json(json_file)

    common: dict[str, Any] = {"device": device, "repeats": repeats, "engine": engine, "skip": not asked}
    common |= {"start_together": start_together, "budget": budget, "keep": keep}
    try:
        with progress() as tell:
            if pipeline == "vllm":
                found = reproduce_vllm(chosen, **common, report=tell, vllm_python=vllm)
            elif only_phases:
                found = reproduce_phases(chosen, device=device, phase_seconds=phase_seconds, report=tell)
            else:
                found = run(chosen, **common, report=tell, phase_seconds=phase_seconds)
    except (KeyboardInterrupt, SplitwiserError):
        if kept:
            _show(kept[0])
        raise
    _tell(found, json_file)
    if pipeline == "hf":
        _explain_ncu(found)
    if not (found.rows or only_phases):
        raise SplitwiserError(f"--seconds {seconds:g} left no time to measure anything: give more.")
    if asked and found.skipped:
        raise SplitwiserError(f"{', '.join(found.skipped)}: asked for, and cannot run here; the reasons are above.")


def _tell(found: Reproduction, json_file: Path | None) -> None:
    """Print a document, and write it if asked to. Raises SplitwiserError when a token differs without a reason."""
    if json_file:
        found.to_json(json_file)
    _show(found)
    if found.unexplained:
        raise SplitwiserError(
            f"tokens differ from the reference's in {', '.join(found.unexplained)}, and precision does not explain it."
        )


def _show(found: Reproduction) -> None:
    """Print a document: its tables, what they mean, and what is missing."""
    for table in found.tables():
        console.print(table)
    if found.work.random_weights:
        console.print(
            f"{found.work.model} has random weights: its times are those of the real model, its tokens mean nothing"
        )
    for note in found.notes():
        console.print(note, markup=False, highlight=False)
    for line in found.missing():
        console.print(line, markup=False, highlight=False)


def _explain_ncu(found: Reproduction) -> None:
    """On a GPU, say how to have every kernel of a phase counted."""
    if not str(found.origin["hardware"]["device"]).startswith("cuda"):
        return
    from splitwiser_lab.measure.ncu import ncu_command

    w = found.work
    words = ["--model", w.model, "--batch", str(w.batch), "--input", str(w.input_tokens), "--dtype", w.dtype]
    console.print(
        "To have each kernel counted (Nsight Compute, where the driver allows it), then `splitwiser-lab ncu FILE`:"
    )
    for phase in ("prefill", "decode"):
        console.print(shlex.join(ncu_command(phase, f"{phase}.csv", words)), markup=False, highlight=False)


@app.command()
def ncu(
    files: Annotated[list[Path], typer.Argument(help="CSV files that ncu wrote, by the command `reproduce` prints.")],
    longest: Annotated[int, typer.Option(help="How many of the longest kernels to show.")] = 5,
) -> None:
    """Read what Nsight Compute counted: how much of the SMs and of the memory bandwidth each phase used."""
    from splitwiser_lab.measure.ncu import read_ncu, summed

    for file in files:
        kernels = read_ncu(file)
        table = Table("kernel", "µs", "SMs %", "DRAM bandwidth %", title=file.name)
        for kernel in (summed(kernels), *sorted(kernels, key=lambda kernel: -kernel.seconds)[:longest]):
            cells = (f"{1e6 * kernel.seconds:,.1f}", f"{kernel.sm_percent:.1f}", f"{kernel.dram_percent:.1f}")
            table.add_row(shortened(kernel.name, 80), *cells)
        console.print(table)


def _numbers(what: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a comma-separated list."""
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise SplitwiserError(f"--{what} {text!r}: give whole numbers, comma-separated, such as 2,4.") from None
