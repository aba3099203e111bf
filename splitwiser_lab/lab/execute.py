"""Run notebooks in a fresh kernel and keep only what belongs in the repository.

    python -m splitwiser_lab.lab.execute notebooks/00_quickstart.ipynb notebooks/02_split_pipeline.ipynb

Pictures come out static. Widget state, timing metadata and this machine's folders are removed; the kernel is
called python3; badge and install line follow `setup.REPOSITORY`. A notebook that raises is left as it was.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import nbformat
import typer
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal

from splitwiser_lab.lab.display import STATIC_VARIABLE
from splitwiser_lab.lab.setup import REPOSITORY, badge

_BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\([^)]*\)")
_ADDRESS = re.compile(r"git\+https?://[^\s\"']+")
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_KEPT_METADATA = {"tags"}  # of a cell
_WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path: Path, timeout_s: float = 600.0) -> None:
    """Run the notebook at `path` from its own folder and write it back, scrubbed.

    Raises nbclient's CellExecutionError when a cell raises, CellTimeoutError when it takes longer than `timeout_s`;
    the file is then unchanged.
    """
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    relink(notebook, path.name)
    before = os.environ.get(STATIC_VARIABLE)
    os.environ[STATIC_VARIABLE] = "1"
    try:
        folder = {"metadata": {"path": str(path.resolve().parent)}}
        NotebookClient(notebook, timeout=timeout_s, kernel_name="python3", resources=folder).execute()
    finally:
        if before is None:
            del os.environ[STATIC_VARIABLE]
        else:
            os.environ[STATIC_VARIABLE] = before
    scrub(notebook, path.resolve().parent)
    write(notebook, path)


def relink(notebook: Any, name: str) -> None:
    """Point the badge and the install line of a notebook with this file name to `setup.REPOSITORY`."""
    for cell in notebook.cells[:2]:
        cell.source = _ADDRESS.sub(f"git+{REPOSITORY}", _BADGE.sub(badge(name), cell.source))


def scrub(notebook: Any, folder: Path) -> None:
    """Remove from an executed notebook what tells of this machine or this moment, and all widget state."""
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})  # type: ignore[no-untyped-call]
    places = _places(folder)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in _KEPT_METADATA})  # type: ignore[no-untyped-call]
        if cell.cell_type != "code":
            continue
        cell.outputs = _together([output for output in cell.outputs if _WIDGET not in output.get("data", {})])
        for output in cell.outputs:
            output.pop("transient", None)
            if "text" in output:
                output["text"] = _hide(output["text"], places)
            for kind, content in output.get("data", {}).items():
                if isinstance(content, str):
                    output["data"][kind] = _hide(content, places)


def _together(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbouring pieces of one stream as one: how a kernel cut them is a matter of the moment."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" == last.get("output_type") and output.name == last["name"]:
            last["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def write(notebook: Any, path: Path) -> None:
    """Write a notebook, all or nothing. Raises nbformat's ValidationError for one that is not well formed."""
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text.rstrip("\n") + "\n")
    os.chmod(file.name, path.stat().st_mode)
    os.replace(file.name, path)


def _places(folder: Path) -> dict[str, str]:
    """This machine's names -> what stands for them, longest first."""
    known = {str(folder.parent): "..", str(Path(sys.prefix)): "<environment>", str(Path.home()): "~"}
    known |= {tempfile.gettempdir(): "<temporary>", socket.gethostname(): "<host>"}
    return {name: known[name] for name in sorted(known, key=len, reverse=True) if len(name) > 3}


def _hide(text: str, places: dict[str, str]) -> str:
    for name, stand_in in places.items():
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", stand_in, text)
    return text


def main(
    notebooks: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Notebooks to run in place.")],
    timeout: Annotated[float, typer.Option(help="Seconds that one cell may take.")] = 600.0,
    only_relink: Annotated[bool, typer.Option("--relink", help="Only renew the links; run nothing.")] = False,
) -> None:
    """Run notebooks in a fresh kernel, with static pictures, and write them back without this machine's traces."""
    for path in notebooks:
        if only_relink:
            notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
            relink(notebook, path.name)
            write(notebook, path)
            continue
        typer.echo(f"{path.name}: running ...", err=True)
        try:
            execute(path, timeout)
        except CellControlSignal as error:
            typer.echo(f"{path.name}: a cell raised or took too long: the file is left as it was.\n{error}", err=True)
            raise typer.Exit(1) from None
        typer.echo(f"{path.name}: done, {path.stat().st_size / 1024:.0f} KB", err=True)


if __name__ == "__main__":
    typer.run(main)
