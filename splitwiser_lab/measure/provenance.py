"""Where a figure came from: machine, versions, command, commit, time."""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitwiser_lab import hardware

_PACKAGES = ("splitwiser-lab", "torch", "transformers", "numpy", "tokenizers", "safetensors")


def provenance(device: str = "auto") -> dict[str, Any]:
    """What every recorded figure carries: hardware, versions, command, commit and UTC time."""
    return {
        "hardware": hardware.describe(device).to_dict(),
        "versions": versions(),
        "command": command(),
        "commit": commit(),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def command() -> str:
    """The command line, without this machine's folders: of an absolute path only the name is kept."""
    words = [_program(), *sys.argv[1:]]
    return shlex.join([Path(word).name if Path(word).is_absolute() else word for word in words])


def _program() -> str:
    name = Path(sys.argv[0]).name or "python"
    return "splitwiser-lab" if name == "__main__.py" else name  # `python -m splitwiser_lab` is the same


def commit() -> str:
    """The commit of the checkout this package runs from, marked when files differ from it; `unknown` without one.

    `git archive` writes its commit into `commit.txt` (see .gitattributes), so that a copy knows it, too.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        exported = Path(__file__).with_name("commit.txt").read_text(encoding="utf-8").strip()
        return "unknown (not run from a git checkout)" if exported.startswith("$") else exported
    try:
        done = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown (git does not answer)"
    return done[0] + (" with uncommitted changes" if done[1] else "")
