"""The first call of every notebook: makes Colab and a local kernel equal, and says what is here and why.

At import it needs nothing but the standard library: on Colab it runs before the package's dependencies
are there, and brings them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from splitwiser_lab.errors import SplitwiserError

if TYPE_CHECKING:
    from splitwiser_lab.hardware import Choice, Hardware, ModeSupport

# PLACEHOLDER: the one place that names the public repository. Badges and the line that installs the package
# on Colab derive from it: after a change run `python -m splitwiser_lab.lab.execute --relink notebooks/*.ipynb`.
REPOSITORY = "https://github.com/maintainers/splitwiser_lab"

_DISTRIBUTION = "splitwiser-lab"
_NOT_ON_COLAB = {"jupyterlab"}  # Colab has a front end of its own
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too; they would leave widget state in a notebook
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Here:
    """What `setup` found: the machine, the automatic choices with their reasons, the modes, the pictures' form."""

    hardware: Hardware
    device: Choice
    dtype: Choice
    support: list[ModeSupport]
    pictures: Choice
    versions: dict[str, str]

    @property
    def modes(self) -> list[str]:
        """Names of the modes that run here."""
        return [mode.mode for mode in self.support if mode.available]

    def __str__(self) -> str:
        machine = self.hardware
        missing: dict[str, list[str]] = {}
        for mode in self.support:
            if not mode.available:
                missing.setdefault(mode.reason, []).append(mode.mode)
        names = {"splitwiser-lab": "splitwiser_lab"}
        shown = ("splitwiser-lab", "python", "torch", "transformers")
        lines = [
            ("versions", " · ".join(f"{names.get(name, name)} {self.versions[name]}" for name in shown)),
            ("machine", f"{machine.device_name}, {machine.cores} CPU cores, {machine.memory_bytes / 2**30:.0f} GiB"),
            ("device", f"{self.device.value}: {self.device.reason}"),
            ("dtype", f"{self.dtype.value}: {self.dtype.reason}"),
            ("modes", ", ".join(self.modes)),
            *(("not here", f"{', '.join(modes)}: {reason}") for reason, modes in missing.items()),
            ("pictures", f"{self.pictures.value}: {self.pictures.reason}"),
        ]
        return "\n".join(f"{name:<10}{value}" for name, value in lines)


def setup(quiet: bool = False) -> Here:
    """Make this kernel ready, print what is here and why (unless `quiet`), and return it. Calling it again is fine.

    On Colab, installs what is missing and replaces nothing that is there. Everywhere, silences the progress
    bars and log lines of transformers, and chooses how pictures are shown. Raises SplitwiserError when an
    installation fails.
    """
    if in_colab() and (missing := missing_requirements()):
        install(missing)
    _silence()

    from splitwiser_lab.engine.modes import supported_modes
    from splitwiser_lab.hardware import choose_device, choose_dtype, describe
    from splitwiser_lab.lab.display import choose_pictures, prepare_plotly
    from splitwiser_lab.measure.provenance import versions

    device, pictures = choose_device(), choose_pictures()
    prepare_plotly(pictures.value)
    dtype, support = choose_dtype(device.value), supported_modes(device.value)
    here = Here(describe(device.value), device, dtype, support, pictures, versions())
    if not quiet:
        print(here)
    return here


def in_colab() -> bool:
    """Whether this kernel is Google Colab's."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return True
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # there is no package `google` at all
        return False


def missing_requirements() -> list[str]:
    """The package's own requirements that are not installed here in any version, as pip takes them."""
    missing = []
    for requirement in importlib.metadata.requires(_DISTRIBUTION) or []:
        wanted, _, marker = requirement.partition(";")
        name = re.split(r"[\s<>=!~\[(]", wanted.strip(), maxsplit=1)[0]
        if "extra" in marker or name in _NOT_ON_COLAB:
            continue
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(wanted.strip())
    return missing


def install(requirements: list[str]) -> None:
    """Have pip install `requirements`, every version that is already here held fixed. Raises SplitwiserError."""
    held = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions() if found.name}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("\n".join(sorted(held)), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise SplitwiserError(
            f"pip could not install {', '.join(requirements)} beside what is here: {last[0]}. Check the network, "
            "then run this cell again."
        )
    importlib.invalidate_caches()


def badge(notebook: str) -> str:
    """The Markdown badge that opens `notebook` (its file name in notebooks/) on Colab."""
    repository = REPOSITORY.removeprefix("https://")
    address = f"https://colab.research.google.com/{repository.replace('.com', '', 1)}/blob/main/notebooks/{notebook}"
    return f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"


def _silence() -> None:
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    if "transformers" in sys.modules:  # it reads the environment only when it is imported
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
