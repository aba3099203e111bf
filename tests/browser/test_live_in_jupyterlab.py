"""What a learner does with the live lab, done by a real browser in a real JupyterLab."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from dashboard import View
from jupyter import ROOT, Notebook, browser, plain_copy, server, why_not

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
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    copy = plain_copy(ROOT / "notebooks" / "04_live_lab.ipynb", folder)
    with server(folder, home) as address, browser() as page:
        opened = Notebook(page, address, copy.name)
        opened.run_all(300)
        yield opened


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
    live.until("requests were compared", lambda: live.compared() > 4)
    live.press("processes")
    live.until("the flip took effect", lambda: "since: processes" in live.text("numbers"))
    live.until("two lanes are drawn", lambda: {"prefill", "decode"} <= set(live.lane_names().split()))
    numbers, compared = live.text("numbers"), live.compared()
    live.until("the numbers change", lambda: live.text("numbers") != numbers)
    live.until("more requests were compared", lambda: live.compared() > compared + 4)
    live.shot(SHOTS / "live.png")
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
    replay.press("Run") if "Stop" not in replay.buttons() else None
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
