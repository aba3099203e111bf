"""What a person sees and presses in a dashboard of the lab: its numbers, lanes, buttons."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from jupyter import Notebook


class View:
    """One of the dashboards of a notebook, numbered from 0 as they come."""

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

    def compared(self) -> int:
        """Finished requests whose tokens were found to be the reference's."""
        found = re.search(r"all (\d+) finished", self.text("tokens"))
        return int(found[1]) if found else 0

    def buttons(self) -> str:
        """What is written on the controls."""
        return str(self.page.locator(".splitwiser-controls").nth(self.number).inner_text())
