"""The widgets of the live lab: made from what a source offers, and kept in step with it.

Only widgets and arguments that ipywidgets 7 and 8 both have. A control that does nothing at the moment is grey, and
a line below says why; a mode that cannot run here is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import ipywidgets as widgets

from splitwiser_lab.lab.dashboard.source import Knob, Source


class Controls:
    """`box` is the widget to show; `sync` brings it up to date with the source."""

    def __init__(self, source: Source, on_start: Callable[[], None] | None = None, note: str = "") -> None:
        """`on_start` is called when somebody presses Run; None lets the source start. `note` stands below."""
        self._source, self._on_start = source, on_start or source.start
        self._syncing, self._note = False, note
        self._button = widgets.Button(description="Stop", layout=widgets.Layout(width="84px"))
        self._button.on_click(self._pressed)
        there = [mode.mode for mode in source.modes if mode.available]
        self._modes = widgets.ToggleButtons(options=there, value=source.mode, style={"button_width": "auto"})
        self._modes.observe(self._mode_chosen, "value")
        self._sliders = {knob.name: self._slider(knob) for knob in source.knobs}
        self._why = widgets.HTML()
        self.box = widgets.VBox(
            [
                widgets.HBox([self._button, self._modes], layout=_wrapping()),
                widgets.HBox(list(self._sliders.values()), layout=_wrapping()),
                self._why,
                roomy(),
            ]
        )
        self.box.add_class("splitwiser-controls")
        self.sync()

    def sync(self) -> None:
        """Show the source's present mode, knobs and state; calls nobody back."""
        with self._quietly():
            active = self._source.active
            self._set(self._button, description="Stop" if active else "Run", icon="stop" if active else "play")
            self._set(self._modes, value=self._source.mode)
            knobs = list(self._source.knobs)
            for knob in knobs:
                slider = self._sliders[knob.name]
                if tuple(slider.options) != knob.choices:
                    slider.options = knob.choices
                self._set(slider, value=knob.value, disabled=bool(knob.why_not), description=knob.label)
            self._set(self._why, value=_reasons(self._source, knobs, self._note))

    def _slider(self, knob: Knob) -> Any:
        made = slider(knob)
        made.observe(lambda new: self._turned(knob.name, new["new"]), "value")
        return made

    def _pressed(self, _: Any) -> None:
        if self._source.active:
            self._source.stop()
        else:
            self._on_start()
        self.sync()

    def _mode_chosen(self, new: Any) -> None:
        if not self._syncing:
            self._source.choose(new["new"])
            self.sync()

    def _turned(self, name: str, value: Any) -> None:
        if not self._syncing:
            self._source.turn(name, value)
            self.sync()

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        before, self._syncing = self._syncing, True
        try:
            yield
        finally:
            self._syncing = before

    @staticmethod
    def _set(widget: Any, **values: Any) -> None:
        """Set what differs: each assignment is a message."""
        for name, value in values.items():
            if getattr(widget, name) != value:
                setattr(widget, name, value)


def slider(knob: Knob) -> Any:
    """The widget of a knob: its choices in their unit, told of when it is let go. `roomy` belongs beside it."""
    made = widgets.SelectionSlider(
        options=knob.choices,
        value=knob.value,
        description=knob.label,
        continuous_update=False,
        style={"description_width": "112px"},
        layout=widgets.Layout(width="360px"),
    )
    made.add_class("splitwiser-slider")
    return made


def roomy() -> Any:
    """An unseen widget by which sliders have room for "1,024 tokens"; by itself a front end cuts such a text."""
    rule = ".splitwiser-slider .widget-readout {min-width: 100px}"
    return widgets.HTML(f"<style>{rule}</style>", layout=widgets.Layout(display="none"))


def _wrapping() -> Any:
    return widgets.Layout(flex_flow="row wrap", align_items="center")


def _reasons(source: Source, knobs: list[Knob], note: str) -> str:
    """Why modes are missing and controls are grey, folded."""
    modes: dict[str, list[str]] = {}
    for mode in source.modes:
        if not mode.available:
            modes.setdefault(mode.reason, []).append(mode.mode)
    said = [f"<b>{escape(', '.join(names))}</b>: {escape(reason)}" for reason, names in modes.items()]
    grey = [f"<b>{escape(knob.label)}</b>: {escape(knob.why_not)}" for knob in knobs if knob.why_not]
    parts = [escape(note)] if note else []
    if said:
        parts.append("Modes not here: " + "; ".join(said) + ".")
    if grey:
        parts.append("Grey: " + "; ".join(grey) + ".")
    return f'<div style="font-size:12px;line-height:1.4;opacity:.75">{"<br>".join(parts)}</div>'
