"""The command that runs the paper's experiments again."""

from __future__ import annotations

from typing import Annotated

import typer

from splitwiser_lab.cli.common import Device, Json, app, console, named_modes, progress
from splitwiser_lab.errors import SplitwiserError


@app.command()
def reproduce(
    pipeline: Annotated[str, typer.Option(help="hf: the paper's Hugging Face pipeline, truly split.")] = "hf",
    scale: Annotated[str, typer.Option(help="small (two minutes on two cores) or paper (meant for a GPU).")] = "small",
    mode: Annotated[str, typer.Option(help="replicas, split; comma-separated. Empty: as the scale has it.")] = "",
    processes: Annotated[str, typer.Option(help="Numbers of processes, comma-separated.")] = "",
    mps: Annotated[bool | None, typer.Option("--mps/--no-mps", help="Run the processes under MPS.")] = None,
    sm_shares: Annotated[str, typer.Option(help="Percent of the SMs of each process under MPS, as 75,25.")] = "",
    model: Annotated[str | None, typer.Option(help="Alias, folder, Hub id, or a shape with random weights.")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests in a batch.")] = None,
    input_tokens: Annotated[int | None, typer.Option("--input", help="Prompt length in tokens.")] = None,
    output_tokens: Annotated[str, typer.Option("--output", help="New tokens; several, comma-separated.")] = "",
    requests: Annotated[int | None, typer.Option(help="How many.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random prompts.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    engine: Annotated[bool, typer.Option(help="Also run this package's engine on the same work.")] = True,
    json_file: Json = None,
) -> None:
    """Rerun the paper's experiment: every placement on the same work, interleaved, every token checked."""
    from splitwiser_lab.pipelines.experiment import EXPERIMENTS
    from splitwiser_lab.pipelines.reproduce import reproduce as run

    if pipeline != "hf":
        raise SplitwiserError(f"no pipeline {pipeline!r} can be reproduced: use 'hf'.")
    if scale not in EXPERIMENTS:
        raise SplitwiserError(f"unknown scale {scale!r}: use {' or '.join(EXPERIMENTS)}.")
    chosen = EXPERIMENTS[scale].with_knobs(
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
    with progress() as tell:
        found = run(chosen, device=device, repeats=repeats, engine=engine, skip=not (mps or sm_shares), report=tell)
    console.print(found.table())
    if found.random_weights:
        console.print(
            f"{chosen.model} has random weights: its times are those of the real model, its tokens mean nothing"
        )
    for reason in dict.fromkeys(found.skipped.values()):
        names = ", ".join(name for name, why in found.skipped.items() if why == reason)
        console.print(f"left out: {names}: {reason}", markup=False, highlight=False)
    if json_file:
        found.to_json(json_file)
    if found.unexplained:
        raise SplitwiserError(
            f"tokens differ from generate in {', '.join(found.unexplained)}, and precision does not explain it."
        )


def _numbers(what: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a comma-separated list."""
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise SplitwiserError(f"--{what} {text!r}: give whole numbers, comma-separated, such as 2,4.") from None
