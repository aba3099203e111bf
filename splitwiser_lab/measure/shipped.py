"""Where the files of `data/` lie: beside the package in a source checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PLACES = (Path(__file__).parents[2] / "data", Path(__file__).parents[1] / "_data")


def find(name: str) -> Path | None:
    """The file or folder of this name under `data/` (e.g. `prompts.json`, `recordings/cpu`), or None."""
    return next((place / name for place in PLACES if (place / name).exists()), None)
