"""Where pictures go: interactive where somebody can touch them, static where they are kept.

An output holds every form it may need, and the front end takes the best that it understands. So a wrong
guess about the front end costs size or interaction, never the picture. No widget is made.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from html import unescape
from typing import Any, Literal

from splitwiser_lab.hardware import Choice
from splitwiser_lab.lab.dashboard.frame import Frame
from splitwiser_lab.lab.setup import in_colab
from splitwiser_lab.lab.static import gantt_svg
from splitwiser_lab.timeline import Timeline

STATIC_VARIABLE = "SPLITWISER_LAB_STATIC"
# What plotly makes of a figure, by front end. Its own choice in a notebook would store megabytes of script there.
_RENDERERS = {"static": "plotly_mimetype", "interactive": "plotly_mimetype", "interactive (Colab)": "colab"}

_WIDTH = 760  # pixels: what a notebook page has beside a file browser

Form = Literal["static", "interactive", "interactive (Colab)"]


def choose_pictures() -> Choice:
    """In which form pictures are shown here, and why.

    Interactive only where something says that a live front end is there: a kernel that nbconvert, nbclient
    or nbmake started has no sign of it.
    """
    wish = os.environ.get(STATIC_VARIABLE, "")
    live: Form = "interactive (Colab)" if in_colab() else "interactive"
    if wish:
        form: Form = live if wish == "0" else "static"
        return Choice(form, f"{STATIC_VARIABLE}={wish} is set")
    if in_colab():
        return Choice(live, "this is Colab")
    if not in_kernel():
        return Choice("static", "this is not a notebook's kernel")
    if "JPY_SESSION_NAME" in os.environ:
        return Choice(live, "a Jupyter server opened this notebook; it keeps a static copy beside")
    if "VSCODE_PID" in os.environ or "VSCODE_CWD" in os.environ:
        return Choice(live, "VS Code opened this notebook; it keeps a static copy beside")
    return Choice("static", f"no live front end shows itself (nbconvert, nbmake); {STATIC_VARIABLE}=0 says otherwise")


def prepare_plotly(form: str) -> None:
    """Let the user's own plotly figures appear in this form as well. Does not import plotly."""
    renderer = _RENDERERS[form]
    os.environ["PLOTLY_RENDERER"] = renderer  # read when plotly is first imported
    if "plotly.io" in sys.modules:
        sys.modules["plotly.io"].renderers.default = renderer


def show(picture: Any, title: str | None = None) -> None:
    """Show a run's timeline, {mode: timeline}, a moment of the live view, a plotly figure, or an SVG text.

    Timelines are drawn as Gantts: a static SVG always, and with it an interactive figure where there is a live
    front end. A plotly figure has no static form: without a front end a line of text stands for it.
    Raises TypeError for anything else.
    """
    form = choose_pictures().value
    if isinstance(picture, str):
        publish(static(picture))
        return
    if isinstance(picture, Timeline):
        picture = {title or "": picture}
    if isinstance(picture, Mapping) and picture and all(isinstance(t, Timeline) for t in picture.values()):
        bundle = static(gantt_svg(picture, _WIDTH))
        if form != "static":
            from splitwiser_lab.lab.plots import gantts

            bundle |= _interactive(gantts(picture, title), form)
        publish(bundle)
    elif isinstance(picture, Frame):
        from splitwiser_lab.lab.dashboard.picture import picture as draw

        publish(static(draw(picture)))
    elif hasattr(picture, "to_plotly_json"):
        said = {"text/plain": "An interactive figure: run this cell in JupyterLab, VS Code or Colab to see it."}
        publish(said if form == "static" else said | _interactive(picture, form))
    else:
        raise TypeError(
            f"cannot show a {type(picture).__name__}: give a Timeline, {{mode: Timeline}}, a plotly figure or SVG text."
        )


class Redrawn:
    """One output that can be drawn again in its place: first the prediction, then what was measured beside it."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, svg: str, figure: Callable[[], Any] | None = None) -> None:
        """Show the static picture, and where there is a live front end the plotly figure that `figure` makes.

        What will be drawn again has no `figure`: in JupyterLab the first plotly figure of an output stays for good.
        """
        form = choose_pictures().value
        bundle = static(svg)
        if figure is not None and form != "static":
            bundle |= _interactive(figure(), form)
        if not in_kernel():
            print(bundle["text/plain"])
        elif self._handle is None:
            from IPython.display import display

            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(bundle, raw=True)


def static(svg: str) -> dict[str, Any]:
    """An SVG, and its title and description as text for readers that do not see it."""
    said = [match for tag in ("title", "desc") for match in re.findall(f"<{tag}>(.*?)</{tag}>", svg, re.DOTALL)[:1]]
    return {"image/svg+xml": svg, "text/plain": unescape(". ".join(said)) or "a picture"}


def _interactive(figure: Any, form: str) -> dict[str, Any]:
    import plotly.io

    return dict(plotly.io.renderers[_RENDERERS[form]].to_mimebundle(figure.to_dict()))


def publish(bundle: dict[str, Any]) -> None:
    """Show one output that holds the same in several forms (MIME type -> content); as text outside a notebook."""
    if not in_kernel():
        print(bundle["text/plain"])
        return
    from IPython.display import display

    display(bundle, raw=True)  # type: ignore[no-untyped-call]


def in_kernel() -> bool:
    """Whether this process is a notebook's kernel, and not a script or a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
