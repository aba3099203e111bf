"""The command that measures: bench, with a suite for any machine and one for GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from splitwiser_lab.cli.common import Device, Dtype, Json, Model, Repeats, app, console, judge, progress, show
from splitwiser_lab.errors import SplitwiserError


@app.command()
def bench(
    model: Model = "smollm2-135m",
    device: Device = "auto",
    dtype: Dtype = "auto",
    repeats: Repeats = 5,
    vllm: Annotated[str | None, typer.Option(help="The Python of an environment that has vLLM.")] = None,
    json_file: Json = None,
    suite: Annotated[str, typer.Option(help="phases (any machine), or gpu: its sections are chosen below.")] = "phases",
    shapes: Annotated[str, typer.Option(help="gpu: models, comma-separated; shapes have random weights.")] = "",
    sections: Annotated[
        str, typer.Option(help="gpu: efficiency,overlap,sweep,peers,kernels,hostbound; empty: all.")
    ] = "",
    seconds: Annotated[float, typer.Option(help="gpu: end within this time, whatever is then left out.")] = 500.0,
    record: Annotated[Path | None, typer.Option(help="gpu: a folder for recordings of the sweep.")] = None,
    ttft_ms: Annotated[float, typer.Option(help="gpu: limit of the time to the first token, for goodput.")] = 500.0,
    itl_ms: Annotated[float, typer.Option(help="gpu: limit of a request's p99 gap between tokens.")] = 30.0,
    modes: Annotated[str, typer.Option(help="gpu: modes of the sweep, e.g. chunked,auto:itl_limit_ms=30.")] = "",
    rates: Annotated[str, typer.Option(help="gpu: rates of the sweep as parts of the capacity, e.g. 0.7,1.0.")] = "",
    capacity: Annotated[
        float | None, typer.Option(help="gpu: requests/s of the sweep's 100 %, as an earlier call measured it.")
    ] = None,
    loads: Annotated[int, typer.Option(help="gpu: how many loads of the gain map, from the first; 0: all.")] = 0,
    join: Annotated[
        list[Path] | None, typer.Option(help="gpu: run nothing, put together what --json of earlier calls wrote.")
    ] = None,
) -> None:
    """Measure our phases beside transformers' and vLLM's, the overheads, the overlap gain, and every mode."""
    if join:
        _join(join, json_file)
        return
    if suite == "gpu":
        from splitwiser_lab.measure.gpu_suite.plan import ChatLimits

        chosen = {"device": device, "dtype": dtype, "repeats": repeats, "seconds": seconds, "vllm": vllm}
        chosen |= {"modes": _words(modes), "rates": _numbers(rates), "capacity": capacity, "loads": loads}
        limits = ChatLimits(ttft_ms, itl_ms)
        _gpu_suite(_words(shapes), _words(sections), path=json_file, record=record, limits=limits, **chosen)
        return
    if suite != "phases":
        raise SplitwiserError(f"unknown suite {suite!r}: choose 'phases' or 'gpu'.")
    from splitwiser_lab.measure.bench import bench as measure

    with progress() as report:
        found = measure(model, repeats=repeats, vllm_python=vllm, report=report, device=device, dtype=dtype)
    console.print(found.table())
    console.print(found.breakdown_table())
    for peer, agreement in found.tokens.items():
        console.print(f"tokens of {peer}: {agreement} to ours; it ran: {found.settings[peer]}", highlight=False)
    if json_file:
        found.to_json(json_file)
    show(found.comparison, None)
    judge(found.comparison)


def _gpu_suite(shapes: list[str], sections: list[Any], **settings: Any) -> None:
    from splitwiser_lab.measure.gpu_suite.suite import Suite
    from splitwiser_lab.measure.gpu_suite.tables import tables

    given: dict[str, Any] = {name: value for name, value in (("shapes", shapes), ("sections", sections)) if value}
    with progress() as tell:
        found = Suite(report=tell, **given, **settings).run()
    for table in tables(found):
        console.print(table)


def _join(files: list[Path], json_file: Path | None) -> None:
    from splitwiser_lab.measure.gpu_suite.join import join
    from splitwiser_lab.measure.gpu_suite.tables import tables

    found = join(files)
    if json_file:
        found.to_json(json_file)
    for table in tables(found):
        console.print(table)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise SplitwiserError(f"--rates {text!r}: give numbers with commas between them, as in 0.7,1.0.") from None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
