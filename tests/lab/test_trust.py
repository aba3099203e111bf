"""The project's notebooks are signed, so that JupyterLab shows the pictures in them."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.sign import NotebookNotary

from splitwiser_lab.lab.trust import trust


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two notebooks with an output each, and a Jupyter data folder of the test's own."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    for name in ("a", "b"):
        output = nbformat.v4.new_output("display_data", {"image/svg+xml": f"<svg id='{name}'/>"})
        cell = nbformat.v4.new_code_cell(name, outputs=[output])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / f"{name}.ipynb")
    return tmp_path


def is_trusted(path: Path) -> bool:
    notary = NotebookNotary()
    try:
        return notary.check_signature(nbformat.read(path, as_version=4))
    finally:
        notary.store.close()


def test_signs_each_notebook_once(folder: Path) -> None:
    assert not is_trusted(folder / "a.ipynb")
    assert trust(folder) == 2
    assert is_trusted(folder / "a.ipynb") and is_trusted(folder / "b.ipynb")
    assert trust(folder) == 0


def test_a_changed_notebook_is_no_longer_trusted(folder: Path) -> None:
    trust(folder)
    path = folder / "a.ipynb"
    path.write_text(path.read_text().replace("<svg", "<svg onload='x()'"))
    assert not is_trusted(path)


def test_a_folder_that_is_not_there_has_nothing_to_sign(tmp_path: Path) -> None:
    assert trust(tmp_path / "none") == 0
