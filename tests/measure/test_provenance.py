"""Where a figure came from: the commit, also in a copy without git."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from splitwiser_lab.measure import provenance

ROOT = Path(provenance.__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_an_exported_copy_knows_its_commit(tmp_path: Path) -> None:
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(tmp_path, filter="data")
    asked = "from splitwiser_lab.measure.provenance import commit; print(commit())"
    answer = subprocess.run(
        [sys.executable, "-c", asked], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() and head.stdout.startswith(answer.stdout.strip()), answer.stderr


def test_a_copy_that_nobody_exported_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "splitwiser_lab" / "measure"
    folder.mkdir(parents=True)
    (folder / "commit.txt").write_text("$Format:%h$\n")
    monkeypatch.setattr(provenance, "__file__", str(folder / "provenance.py"))
    assert "not run from a git checkout" in provenance.commit()
