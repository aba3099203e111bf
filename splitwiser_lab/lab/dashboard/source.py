"""What the view and its controls ask of the thing they show. They know a source by this and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from splitwiser_lab.hardware import ModeSupport
from splitwiser_lab.lab.dashboard.frame import Frame


@dataclass(frozen=True)
class Knob:
    """One control: its choices as (text, value), the value now, and in `why_not` why it does nothing at the moment."""

    name: str
    label: str
    choices: tuple[tuple[str, object], ...]
    value: object
    why_not: str = ""

    @classmethod
    def of(
        cls, name: str, label: str, values: Sequence[object], value: object, unit: str = "", why_not: str = ""
    ) -> Knob:
        """With `values` written in `unit`; the present value is added to them where it is missing."""
        numbers = sorted({*values, value}, key=float)  # type: ignore[arg-type]
        return cls(name, label, tuple((f"{number:g} {unit}".strip(), number) for number in numbers), value, why_not)


class Source(Protocol):
    """Something with modes and knobs whose present moment is a frame. All methods return at once."""

    @property
    def modes(self) -> Sequence[ModeSupport]:
        """Every mode, whether it can be chosen, and why not."""
        ...

    @property
    def mode(self) -> str:
        """The mode that is chosen."""
        ...

    @property
    def knobs(self) -> Sequence[Knob]:
        """The controls as they stand, always the same ones in the same order."""
        ...

    @property
    def active(self) -> bool:
        """Whether it runs now: frames change."""
        ...

    def choose(self, mode: str) -> None:
        """Change the mode, from the next step boundary on."""
        ...

    def turn(self, name: str, value: object) -> None:
        """Set a knob."""
        ...

    def start(self) -> None:
        """Run, if it does not."""
        ...

    def stop(self) -> None:
        """Stop running; `start` goes on."""
        ...

    def close(self) -> None:
        """Stop for good and give back threads and memory; waits for them."""
        ...

    def frame(self) -> Frame:
        """The present moment. Never raises for what went wrong in the run: the frame says it."""
        ...
