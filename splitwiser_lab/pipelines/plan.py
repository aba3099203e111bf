"""What taking turns asks of an experiment and of its placements, whichever pipeline they are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from splitwiser_lab.measure.workload import Workload


class Placed(Protocol):
    """What a row says of a placement, whose name is its text."""

    @property
    def mode(self) -> str:
        """The pipeline's mode."""
        ...

    @property
    def processes(self) -> int:
        """How many share the device."""
        ...

    @property
    def mps(self) -> bool:
        """Whether they are clients of an MPS daemon."""
        ...


class Plan(Protocol):
    """An experiment: the work, and the placements that do it."""

    @property
    def placements(self) -> Sequence[Placed]:
        """The ways of the pipeline."""
        ...

    def workload(self, output: int) -> Workload:
        """The requests, with `output` new tokens each."""
        ...

    def warm_up(self, output: int, processes: int) -> Workload:
        """A few of them, enough for so many processes."""
        ...
