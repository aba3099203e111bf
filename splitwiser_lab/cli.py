"""The command line: `splitwiser-lab doctor | demo | compare | bench | record | trace | lab`."""

from __future__ import annotations

import os
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


@app.command()
def doctor(device: Device = "auto", json_file: Json = None) -> None:
    """Show hardware, the choices made for it and why, and every mode with the reason if it cannot run."""
    from splitwiser_lab.measure.doctor import doctor as look

    found = look(device)
    console.print(str(found), markup=False, highlight=False)
    if json_file:
        found.to_json(json_file)


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

    with _progress() as tell:
        found = run(model, new_tokens=new_tokens, repeats=repeats, report=tell, device=device, dtype=dtype)
    for number, (prompt, text) in enumerate(zip(found.prompts, found.texts, strict=True), 1):
        console.rule(f"prompt {number}", align="left", style="dim")
        console.print(_shortened(prompt), style="dim", markup=False, highlight=False)
        console.print("→ " + text.strip(), markup=False, highlight=False)
    console.rule(style="dim")
    _show(found.comparison, json_file)
    for note in notes(found.comparison):
        console.print(f"- {note}", markup=False, highlight=False)
    written = report_comparison(report, f"splitwiser_lab demo: {model}", found.comparison, found.prompts)
    console.print(f"report: {written}", markup=False, highlight=False)
    if picture:
        timelines = {run.mode: run.results[-1].timeline for run in found.comparison.runs}
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(gantt_svg(timelines), encoding="utf-8")
    _judge(found.comparison)


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
    work = _workload(workload, requests, rate, prompt_tokens, output_tokens, scale)
    found = _compare(model, work, modes, repeats, device=device, dtype=dtype, kv_tokens=kv_tokens)
    _show(found, json_file)
    _judge(found)


@app.command()
def bench(
    model: Model = "smollm2-135m",
    device: Device = "auto",
    dtype: Dtype = "auto",
    repeats: Repeats = 5,
    vllm: Annotated[str | None, typer.Option(help="The Python of an environment that has vLLM.")] = None,
    json_file: Json = None,
) -> None:
    """Measure our phases beside transformers' and vLLM's, the overheads, the overlap gain, and every mode."""
    from splitwiser_lab.measure.bench import bench as measure

    with _progress() as report:
        found = measure(model, repeats=repeats, vllm_python=vllm, report=report, device=device, dtype=dtype)
    console.print(found.table())
    for peer, agreement in found.tokens.items():
        console.print(f"tokens of {peer}: {agreement} to ours", highlight=False)
    if json_file:
        found.to_json(json_file)
    _show(found.comparison, None)
    _judge(found.comparison)


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

    work = _workload(workload, requests, rate, prompt_tokens, output_tokens, scale)
    load = {"device": device, "dtype": dtype, "kv_tokens": kv_tokens}
    with _progress() as tell:
        made = run(model, work, _named(modes), repeats=repeats, report=tell, **load)
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
    os.execv(sys.executable, [sys.executable, *words])


def _shortened(prompt: str, most: int = 160) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= most else line[:most] + " ..."


def _workload(kind: str, requests: int, rate: float, prompt: int, output: int, scale: float) -> Workload:
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


def _named(modes: str) -> list[str] | None:
    return [mode.strip() for mode in modes.split(",") if mode.strip()] or None


def _compare(model: str, workload: Workload, modes: str, repeats: int, **load: Any) -> Comparison:
    from splitwiser_lab.measure.compare import compare as run

    with _progress() as report:
        return run(model, workload, _named(modes), repeats=repeats, report=report, **load)


def _show(found: Comparison, json_file: Path | None) -> None:
    console.print(found.table())
    for run in found.runs:
        for difference in run.differences:
            console.print(f"{run.mode}: {difference}", markup=False, highlight=False)
    if json_file:
        found.to_json(json_file)


def _judge(found: Comparison) -> None:
    """End with an error when a token differs and half precision does not explain it."""
    wrong = [run.mode for run in found.runs if not all(c.explained for checks in run.checks for c in checks)]
    if wrong:
        raise SplitwiserError(
            f"tokens differ from the reference in {', '.join(wrong)}, and precision does not explain it."
        )


@contextmanager
def _progress() -> Iterator[Any]:
    """A line on stderr that says what is going on: a live one in a terminal, plain lines elsewhere."""
    if notices.is_terminal:
        with notices.status("starting ...") as status:
            yield status.update
    else:
        yield lambda message: notices.print(message, markup=False, highlight=False)


def main() -> None:
    """Run the command line; errors of this package end it with their message and status 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (SplitwiserError, OSError) as error:
        notices.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        notices.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
