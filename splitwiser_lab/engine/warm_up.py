"""Before the first request: lanes make what their usual batches need, so that none of these is slow.

On a GPU the first two batches of each shape compile kernels and capture a graph, which takes the one thread that feeds
all lanes tens of milliseconds each. On a CPU there is nothing to make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from splitwiser_lab.engine.core import Core
from splitwiser_lab.engine.scheduler import Limits, Policy, decode_only, mixed, prefill_first, prefill_only
from splitwiser_lab.engine.station import Station
from splitwiser_lab.lanes.base import Lane
from splitwiser_lab.model.graph_shapes import UsualWork

Report = Callable[[str], None]


def usual_work(policy: Policy, limits: Limits) -> UsualWork:
    """What a lane with this policy is usually given."""
    return UsualWork(
        rows=limits.max_requests if policy in (decode_only, prefill_first, mixed) else 0,
        prefill_tokens=limits.prefill_tokens if policy in (prefill_only, prefill_first) else 0,
        mixed_tokens=limits.chunk_tokens if policy is mixed else 0,
    )


class WarmUp:
    """Warms each lane up once for each kind of work, while no request is under way."""

    def __init__(self, core: Core, wanted: bool = True, report: Report | None = None) -> None:
        """`report` is told in a line what is being made."""
        self._core, self._wanted, self._report = core, wanted, report
        self._told: WeakKeyDictionary[Lane, set[UsualWork]] = WeakKeyDictionary()

    def __call__(self, mode: str, stations: Sequence[Station], limits: Limits) -> None:
        """Warm up for `mode`. With batches under way nothing is made: their lanes are needed now. Raises LaneError."""
        if not self._wanted:
            return
        with self._core.at_rest() as resting:
            for station in stations if resting else ():
                work = usual_work(station.policy, limits)
                self._tell(mode, station.lane, work)
                station.lane.warm_up(work)

    def _tell(self, mode: str, lane: Lane, work: UsualWork) -> None:
        """Once for each lane and kind of work: a lane that has done it does nothing the next time."""
        told = self._told.setdefault(lane, set())
        if self._report is not None and work not in told:
            self._report(f"warming up for {mode}: lane {lane.name}, {len(work.shapes())} shapes")
        told.add(work)
