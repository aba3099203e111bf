"""Where batches go: a lane with the policy that feeds it, and the change from some lanes to others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from splitwiser_lab.engine.scheduler import Limits, Policy, Scheduled
from splitwiser_lab.lanes.base import Lane, Ticket
from splitwiser_lab.timeline import ModeChange


@dataclass
class Station:
    """A lane, the policy that feeds it, and the batches under way there, oldest first."""

    lane: Lane
    policy: Policy
    under_way: deque[tuple[Scheduled, Ticket]] = field(default_factory=deque)


@dataclass(frozen=True)
class ModeSwitch:
    """Lanes that are ready, and the limits to schedule under, waiting for the old lanes to drain."""

    change: ModeChange
    stations: list[Station]
    limits: Limits
    cores: dict[str, list[int]]
    controller: Callable[[], ModeSwitch | None] | None = None  # asked before each step which switch to make, if any
