"""Who draws the live view, and when: a task on the kernel's loop, or the cell itself.

In JupyterLab and VS Code a task redraws one figure while the cell has long returned, so that the controls act at
once. Colab runs callbacks only between cells, and nobody turns a knob in a notebook that is executed by a program:
there the cell draws small pictures for a bounded time, and flips the mode by a schedule.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from html import escape
from typing import Any

from splitwiser_lab.hardware import Choice
from splitwiser_lab.lab.dashboard.frame import Frame
from splitwiser_lab.lab.dashboard.numbers import html, said
from splitwiser_lab.lab.dashboard.picture import picture
from splitwiser_lab.lab.dashboard.source import Source
from splitwiser_lab.lab.display import choose_pictures, in_kernel, static

FRAMES_PER_S = 4.0
_SHARE = 0.2  # of the kernel's time that drawing may take: where a frame is dear, they come less often
_PICTURES_PER_S = 2.0
_PREPARE_SECONDS = 600.0


def choose_drawing() -> Choice:
    """`task` where a front end with live widgets shows itself, else `cell` (with `controls` on Colab), and why."""
    pictures = choose_pictures()
    if pictures.value == "static":
        return Choice("cell", pictures.reason)
    if pictures.value == "interactive (Colab)":
        return Choice("cell with controls", "Colab runs callbacks only between cells")
    try:
        import plotly.graph_objects as go

        go.FigureWidget()
    except ImportError as error:  # plotly 6 and later want anywidget
        return Choice("cell with controls", f"plotly has no live figure here ({error})")
    return Choice("task", pictures.reason)


class Dashboard:
    """The view of one source. `stop` and `start` are the button's; `close` gives everything back."""

    def __init__(self, source: Source, drawing: Choice) -> None:
        self.source, self.drawing = source, drawing
        self._task: asyncio.Task[None] | None = None
        self._drawn: Frame | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Dashboard({self.drawing.value}: {self.drawing.reason})"

    def _ipython_display_(self) -> None:
        """It shows itself when it is made; as a cell's last value it adds nothing."""

    def start(self) -> None:
        """Run."""
        self.source.start()

    def stop(self) -> None:
        """Stop running. The view stays."""
        self.source.stop()

    async def stop_after(self, seconds: float) -> None:
        """Let it run on for so long, or until somebody presses Stop, then stop it: `await view.stop_after(20)`.

        What comes after in the notebook has the machine to itself. Where the cell has drawn it already, there is
        nothing left to wait for. The time in which it prepares does not count.
        """
        while self.source.frame().state == "preparing":
            await asyncio.sleep(1 / FRAMES_PER_S)
        until = time.perf_counter() + seconds
        while self.source.active and time.perf_counter() < until:
            await asyncio.sleep(1 / FRAMES_PER_S)
        self.source.stop()
        while self.source.active:
            await asyncio.sleep(1 / FRAMES_PER_S)
        if self._task is not None and not self._task.done():
            self._redraw()  # the next cell may keep the loop busy: nothing is drawn meanwhile

    def close(self) -> None:
        """End for good: the source's threads, and the drawing."""
        self._closed = True
        self.source.close()

    def show_live(self) -> None:
        """Display controls, numbers and figure, and keep them up to date on the kernel's loop."""
        import ipywidgets as widgets
        import plotly.graph_objects as go
        from IPython.display import display

        from splitwiser_lab.lab.dashboard import figure
        from splitwiser_lab.lab.dashboard.controls import Controls

        self._figure = figure.build(go.FigureWidget, self.source.frame().lines)
        self._controls, self._numbers = Controls(self.source), widgets.HTML()
        view = widgets.VBox([self._controls.box, self._numbers, self._figure])
        view.add_class("splitwiser-view")
        display(view)  # type: ignore[no-untyped-call]
        self._task = asyncio.get_running_loop().create_task(self._draw())

    async def _draw(self) -> None:
        """Redraw until closed; what goes wrong is said where the numbers are."""
        try:
            while not self._closed:
                began = time.perf_counter()
                self._redraw()
                spent = time.perf_counter() - began
                await asyncio.sleep(max(1 / FRAMES_PER_S - spent, spent * (1 / _SHARE - 1)))
        except Exception as error:
            self._numbers.value = f"<b>The view ended:</b> {escape(str(error))}. Run the cell again."
            raise

    def _redraw(self) -> None:
        from splitwiser_lab.lab.dashboard import figure

        frame, last = self.source.frame(), self._drawn
        if last is None or frame.now != last.now or frame.state != last.state:
            figure.apply(self._figure, figure.change(frame))
            self._drawn = frame
        self._numbers.value = html(frame)
        self._controls.sync()

    def show_with_controls(self, seconds: float, schedule: Mapping[float, str]) -> None:
        """Controls above, pictures below: once by the schedule now, and without one whenever Run is pressed."""
        from IPython.display import display

        from splitwiser_lab.lab.dashboard.controls import Controls

        note = f"Controls set the next run: {self.drawing.reason}."
        output = _Output()
        self._controls = Controls(self.source, lambda: self._run(output, seconds, {}), note)
        display(self._controls.box)  # type: ignore[no-untyped-call]
        self._run(output, seconds, schedule)
        self._controls.sync()

    def show_in_cell(self, seconds: float, schedule: Mapping[float, str]) -> None:
        """Run for `seconds`, flipping the mode when `schedule` says, and draw pictures of it meanwhile."""
        self._run(_Output(), seconds, schedule)

    def _run(self, output: _Output, seconds: float, schedule: Mapping[float, str]) -> None:
        try:
            self.source.start()
            self._wait(output, lambda frame: frame.state != "preparing", _PREPARE_SECONDS)
            began, due = time.perf_counter(), sorted(schedule.items())
            while (passed := time.perf_counter() - began) < seconds and self.source.active:
                while due and due[0][0] <= passed:
                    self.source.choose(due.pop(0)[1])
                output.show(self.source.frame())
                time.sleep(1 / _PICTURES_PER_S)
        finally:
            last = self.source.frame()
            self.source.stop()
        output.show(last)
        if not in_kernel():
            print(said(last))
        self._wait(None, lambda frame: frame.state not in ("running", "preparing"), 30.0)

    def _wait(self, output: _Output | None, over: Any, seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        while not over(frame := self.source.frame()) and time.perf_counter() < deadline:
            if output is not None:
                output.show(frame)
            time.sleep(1 / _PICTURES_PER_S)


class _Output:
    """One output of a cell that is replaced by each picture; outside a notebook nothing is shown but the last."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, frame: Frame) -> None:
        """Replace the picture."""
        if not in_kernel():
            return
        bundle = static(picture(frame))
        if self._handle is None:
            from IPython.display import display

            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(bundle, raw=True)
