"""Lets JupyterLab show the pictures that the project's notebooks came with.

Outputs of a notebook that this machine's Jupyter has not signed are shown without their SVG. A signature says
"made here, or looked at here": so only this project's own notebooks are signed, and only when somebody opens the lab.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbformat.sign import NotebookNotary


def trust(folder: Path) -> int:
    """Sign the notebooks in `folder` for this user's Jupyter; return how many were not signed before.

    Raises OSError when Jupyter's own folder cannot be written.
    """
    notary: Any = NotebookNotary()  # type: ignore[no-untyped-call]
    signed = 0
    try:
        for path in sorted(folder.glob("*.ipynb")):
            notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
            if not notary.check_signature(notebook):
                notary.sign(notebook)
                signed += 1
    finally:
        notary.store.close()
    return signed
