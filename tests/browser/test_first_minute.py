"""What a newcomer does: `make lab`, Run All Cells, and a real model is at work in plots that move."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from dashboard import View
from jupyter import ROOT, Notebook, browser, lab_command, plain_copy, why_not

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def test_make_lab_opens_the_quickstart_whose_plots_move_and_then_stop(tmp_path: Path) -> None:
    (folder := tmp_path / "notebooks").mkdir()
    (home := tmp_path / "jupyter").mkdir()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, folder)
    plain_copy(ROOT / "notebooks" / "00_quickstart.ipynb", folder)
    began = time.monotonic()
    with lab_command(tmp_path, home) as address, browser() as page:
        opened = Notebook(page, address)
        assert page.locator(".jp-mod-current .lm-TabBar-tabLabel:has-text('00_quickstart.ipynb')").count()
        opened.start_all()
        view = View(opened, 0)
        view.until("bars are drawn", view.lanes)
        before = view.lanes()
        view.until("the bars move", lambda: view.lanes() != before)
        print(f"from the command to a plot that moves: {time.monotonic() - began:.0f} s")
        view.press("chunked")  # while the next cell waits
        view.until("the button acts at once", lambda: "since: chunked" in view.text("numbers"), 15)
        view.until("it stops by itself", lambda: view.text("status").startswith("Stopped."))
        assert opened.errors == []
