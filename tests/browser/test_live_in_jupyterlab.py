"""What a learner does with the live lab, done by a real browser in a real JupyterLab."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jupyter import ROOT, Notebook, browser, server, why_not

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
SHOTS = ROOT / "reports" / "browser"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """04_live_lab, without its outputs, run from top to bottom in JupyterLab."""
    import nbformat

    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    copy = Path(shutil.copy(ROOT / "notebooks" / "04_live_lab.ipynb", folder))
    plain = nbformat.read(copy, as_version=4)
    plain.cells[0].source = "# Live lab"  # the badge there is a picture from the web
    for cell in plain.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(plain, copy)
    with server(folder, home) as address, browser() as page:
        opened = Notebook(page, address, copy.name)
        opened.run_all(300)
        yield opened


class View:
    """One of the two dashboards of the notebook: the live lab is the first, the replay the second."""

    def __init__(self, notebook: Notebook, number: int) -> None:
        self.notebook, self.page, self.number = notebook, notebook.page, number
        self.page.wait_for_function(
            "n => document.querySelectorAll('.splitwiser-controls').length > n", arg=number, timeout=120_000
        )
        self.page.evaluate("n => document.querySelectorAll('.splitwiser-controls')[n].scrollIntoView()", number)

    def text(self, name: str) -> str:
        """What one of the numbers' parts says now."""
        find = "([name, n]) => document.querySelectorAll(`.splitwiser-${name}`)[n]?.innerText ?? ''"
        return self.page.evaluate(find, [name, self.number])

    def lanes(self) -> str:
        """The outlines of all bars of the Gantt, as they are drawn."""
        return self._drawn(".barlayer .point path", "part => part.getAttribute('d')")

    def lane_names(self) -> str:
        """The labels of the Gantt's rows."""
        return self._drawn(".y6tick, .y6tick text", "part => part.textContent")

    def _drawn(self, selector: str, what: str) -> str:
        find = (
            "([n, selector]) => [...(document.querySelectorAll('.splitwiser-view .js-plotly-plot')[n]"
            f"?.querySelectorAll(selector) ?? [])].map({what}).join(' ')"
        )
        return str(self.page.evaluate(find, [self.number, selector]))

    def press(self, button: str) -> None:
        """Click a button of this view's controls."""
        self.page.locator(".splitwiser-controls").nth(self.number).locator(f"button:has-text('{button}')").click()

    def shot(self, path: Path) -> None:
        """A picture of this view alone; `make picture` puts that of the live lab into the README."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.locator(".splitwiser-view").nth(self.number).screenshot(path=str(path))

    def until(self, what: str, holds: Callable[[], object], seconds: float = 90) -> None:
        """Wait until this holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (
                f"not within {seconds:.0f} s: {what}. The view says: {self.text('numbers')}"
            )
            time.sleep(0.2)


@pytest.fixture(scope="module")
def live(notebook: Notebook) -> View:
    """The live lab, running."""
    view = View(notebook, 0)
    view.until("it runs", lambda: view.text("status").startswith("Running."))
    return view


def test_the_plot_moves(live: View) -> None:
    live.until("bars are drawn", live.lanes)
    before = live.lanes()
    live.until("the bars move", lambda: live.lanes() != before)


def test_a_click_on_a_mode_changes_lanes_and_numbers_and_no_token(live: View) -> None:
    live.until("requests were compared", lambda: "identical: all" in live.text("tokens"))
    live.press("processes")
    live.until("the flip took effect", lambda: "since: processes" in live.text("numbers"))
    live.until("two lanes are drawn", lambda: {"prefill", "decode"} <= set(live.lane_names().split()))
    numbers = live.text("numbers")
    live.until("the numbers change", lambda: live.text("numbers") != numbers)
    live.shot(SHOTS / "live.png")
    compared = _compared(live)
    live.until("more requests were compared", lambda: _compared(live) > compared + 2)
    assert live.text("tokens").startswith("✓ tokens identical: all")
    live.press("chunked")
    live.until("it flips again", lambda: "since: chunked" in live.text("numbers"))
    assert "before: processes" in live.text("numbers")


def test_stop_stops_it(live: View) -> None:
    live.press("Stop")
    live.until("it has stopped", lambda: live.text("status").startswith("Stopped."))
    before = live.lanes()
    time.sleep(1.5)
    assert live.lanes() == before
    assert live.text("tokens").startswith("✓")


def test_the_replay_flips_between_recordings_and_says_that_it_is_recorded(notebook: Notebook, live: View) -> None:
    replay = View(notebook, 1)
    assert replay.text("numbers").startswith("RECORDED")
    replay.press("Run") if "Stop" not in _buttons(replay) else None
    replay.until("it plays", lambda: replay.lanes())
    before = replay.lanes()
    replay.until("it moves", lambda: replay.lanes() != before)
    replay.until("some of it has been played", lambda: "At 0." not in replay.text("status"))
    replay.press("processes")
    replay.until("the flip took effect", lambda: "since: processes" in replay.text("numbers"))
    replay.until("its lanes are drawn", lambda: {"prefill", "decode"} <= set(replay.lane_names().split()))
    assert "when this was recorded" in replay.text("tokens")
    replay.shot(SHOTS / "replay.png")


def test_the_console_is_silent_and_nothing_leaves_the_machine(notebook: Notebook, live: View) -> None:
    assert notebook.strangers == []
    assert notebook.errors == []


def _compared(view: View) -> int:
    found = re.search(r"all (\d+) finished", view.text("tokens"))
    return int(found[1]) if found else 0


def _buttons(view: View) -> str:
    return view.page.locator(".splitwiser-controls").nth(view.number).inner_text()
