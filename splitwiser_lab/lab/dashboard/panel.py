"""One small plot as SVG: a box with a time axis, one or two scales, lines, dots, bars and marks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from splitwiser_lab.lab.palette import INK
from splitwiser_lab.lab.svg import ticks
from splitwiser_lab.lab.thinning import Bar
from splitwiser_lab.timeline import SpanPhase

Side = Literal["left", "right"]
Values = Sequence[float | None]
_SMALL = 10  # of letters


@dataclass(frozen=True)
class Scale:
    """A vertical axis from `low` to `high` with these ticks; `log` if the values are placed by their logarithm."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    @classmethod
    def to_hold(cls, values: Values) -> Scale:
        """From 0 to a bit above the largest value."""
        most = max((v for v in values if v is not None), default=0.0) or 1.0
        marks = ticks(most, 4)
        return cls(0.0, 1.08 * max(most, marks[-1]), marks)

    @classmethod
    def logarithmic(cls, values: Values) -> Scale:
        """Around all positive values, with ticks at 1, 2 and 5 of each decade."""
        positive = [v for v in values if v is not None and v > 0] or [10.0, 100.0]
        low, high = 0.8 * min(positive), 1.25 * max(positive)
        all_ticks = [f * 10.0**p for p in range(-3, 7) for f in (1, 2, 5)]
        return cls(low, high, [t for t in all_ticks if low <= t <= high], log=True)

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the lower end and 1 at the upper."""
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, 1e-9))
            return (value - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


class Panel:
    """Give it scales and data, then ask for its `parts`. All in pixels but the time, which is in seconds."""

    def __init__(
        self, x: float, y: float, width: float, height: float, window: tuple[float, float], title: str
    ) -> None:
        self._x, self._y, self._width, self._height = x, y, width, height
        self._window, self._title = window, title
        self._scales: dict[Side, Scale] = {}
        self._axes: list[str] = []
        self._data: list[str] = []
        self._keys: list[tuple[str, str]] = []

    def scale(self, scale: Scale, side: Side = "left") -> None:
        """Place the axis of one side; the left one has grid lines."""
        self._scales[side] = scale
        at = self._x - 5 if side == "left" else self._x + self._width + 5
        anchor = "end" if side == "left" else "start"
        for tick in scale.ticks:
            y = self._at(tick, side)
            if side == "left":
                self._axes.append(
                    f'<path d="M{self._x:.0f} {y:.1f}h{self._width:.0f}" stroke="{INK}" stroke-opacity=".2"/>'
                )
            text = f"{tick:,.4g}" if tick < 10_000 else f"{tick / 1000:,.4g}k"
            self._axes.append(_text(at, y + 3.5, text, anchor))

    def note(self, text: str) -> None:
        """A sentence where there is nothing to plot."""
        self._axes.append(_text(self._x + self._width / 2, self._y + self._height / 2, text, "middle"))

    def line(self, points: tuple[Values, Values], colour: str, side: Side = "left", steps: bool = False) -> None:
        """A line through the points, interrupted where a value is None; with `steps` it keeps each until the next."""
        path, pen = [], "M"
        for t, value in zip(*points, strict=True):
            if t is None or value is None:
                pen = "M"
            elif t >= self._window[0]:
                x, y = self._time(t), self._at(value, side)
                path.append(f"H{x:.1f}V{y:.1f}" if steps and pen == "L" else f"{pen}{x:.1f} {y:.1f}")
                pen = "L"
        if path:
            self._data.append(f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')

    def dots(self, points: tuple[Values, Values], colour: str) -> None:
        """A dot at each point."""
        path = "".join(
            f"M{self._time(t):.1f} {self._at(value, 'left'):.1f}h0"
            for t, value in zip(*points, strict=True)
            if t is not None and value is not None and t >= self._window[0]
        )
        style = f'stroke="{colour}" stroke-width="3" stroke-linecap="round" stroke-opacity=".6"'
        self._data.append(f'<path d="{path}" {style}/>' if path else "")

    def row(self, top: float, height: float, name: str, bars: Sequence[Bar], colours: Mapping[SpanPhase, str]) -> None:
        """A lane: its name, and its bars in the colour of their phase."""
        y = self._y + top
        self._axes.append(_text(self._x - 5, y + height / 2 + 4, name, "end"))
        for phase, colour in colours.items():
            boxes = [
                f'<rect x="{self._time(b.start):.1f}" y="{y:g}" width="{self._wide(b):.1f}" height="{height:g}"/>'
                for b in bars
                if b.phase == phase
            ]
            if boxes:
                self._data.append(f'<g fill="{colour}">{"".join(boxes)}</g>')

    def diamonds(self, top: float, moments: Sequence[float], name: str) -> None:
        """A row of diamonds."""
        y = self._y + top
        self._axes.append(_text(self._x - 5, y + 4, name, "end"))
        path = "".join(f"M{self._time(moment) - 4:.1f} {y:g}l4-4 4 4-4 4z" for moment in moments)
        self._data.append(f'<path d="{path}" fill="{INK}"/>')

    def flips(self, flips: Sequence[tuple[float, str]], named: bool) -> None:
        """A dashed line at each flip, with the new mode's name where there is room for it."""
        shown = [(moment, name) for moment, name in flips if self._window[0] < moment < self._window[1]]
        ends = [self._time(moment) for moment, _ in shown[1:]] + [self._x + self._width + 40]
        for (moment, name), end in zip(shown, ends, strict=False):
            x = self._time(moment)
            style = f'stroke="{INK}" stroke-dasharray="4 3"'
            self._data.append(f'<path d="M{x:.1f} {self._y:.0f}v{self._height:.0f}" {style}/>')
            if named and 5.4 * len(name) + 6 < end - x:
                self._data.append(_text(x + 3, self._y + 10, name))

    def key(self, name: str, colour: str) -> None:
        """An entry of the legend, which stands below the time axis, in as many rows as it needs."""
        self._keys.append((name, colour))

    def parts(self) -> list[str]:
        """Everything, with the time axis."""
        bottom = self._y + self._height
        frame = f'<path d="M{self._x:.0f} {bottom:.1f}h{self._width:.0f}" stroke="{INK}" stroke-opacity=".5"/>'
        title = f'<text x="{self._x:.0f}" y="{self._y - 6:.1f}" font-weight="600">{escape(self._title)}</text>'
        start, end = self._window
        steps = ticks(end - start, 6)
        step = steps[1] - steps[0] if len(steps) > 1 else end - start
        moments = [step * n for n in range(math.ceil(max(0.0, start) / step), math.floor(end / step) + 1)]
        times = [_text(self._time(m), bottom + 13, f"{m:.10g} s", "middle") for m in moments]
        return [frame, title, *self._axes, *self._data, *times, *self._legend(bottom + 29)]

    def _legend(self, y: float) -> list[str]:
        entries, x = [], self._x
        for name, colour in self._keys:
            long = 6.1 * len(name) + 22
            if x > self._x and x + long > self._x + self._width:
                x, y = self._x, y + 14
            entries.append(f'<circle cx="{x + 4:.1f}" cy="{y - 3.5:.1f}" r="4" fill="{colour}"/>')
            entries.append(_text(x + 11, y, name))
            x += long
        return entries

    def _time(self, moment: float) -> float:
        start, end = self._window
        return self._x + self._width * min(1.0, max(0.0, (moment - start) / (end - start)))

    def _at(self, value: float, side: Side) -> float:
        return self._y + self._height * (1 - min(1.0, max(0.0, self._scales[side].share(value))))

    def _wide(self, bar: Bar) -> float:
        wide = self._time(bar.end) - self._time(bar.start)
        return wide - 0.6 if wide > 4 else max(0.4, wide)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{_SMALL}" text-anchor="{anchor}">{escape(text)}</text>'
