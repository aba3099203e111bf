"""Where the time of a phase goes, ours beside the peers': why one is faster than the other.

The profiler itself takes time at every operator, which falls to "everything else": a breakdown explains
a figure of the bench, it does not replace it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from splitwiser_lab.measure.compare import with_range
from splitwiser_lab.measure.op_times import KINDS, by_kind
from splitwiser_lab.measure.peers import Peer

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST = 8  # operators that are kept by name


@dataclass(frozen=True)
class Load:
    """`prompts` of `length` tokens to `new_tokens` each. One new token is prefill; of more, the steps are decode."""

    name: str
    prompts: int
    length: int
    new_tokens: int

    @property
    def steps(self) -> int:
        """Decode steps; 1 for prefill alone."""
        return max(1, self.new_tokens - 1)

    def draw(self, vocabulary: int) -> list[list[int]]:
        """The same random token ids at every call."""
        draw = random.Random(0)
        return [[draw.randrange(10, vocabulary) for _ in range(self.length)] for _ in range(self.prompts)]


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one load by kind of operator, repeat by repeat, and the longest operators of the last one."""

    load: str
    peer: str
    ms: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    longest: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Samples and medians, ready for JSON."""
        medians = {kind: median(samples) for kind, samples in self.ms.items()}
        return {"load": self.load, "peer": self.peer, "ms": medians, "samples": self.ms, "longest_ms": self.longest}


def break_down(
    peers: Sequence[Peer], load: Load, vocabulary: int, repeats: int, report: Callable[[str], None] = lambda _: None
) -> list[Breakdown]:
    """Profile `load` with every peer that can be profiled, by turns; per prefill, or per decode step."""
    prompts, found = load.draw(vocabulary), {peer.name: Breakdown(load.name, peer.name) for peer in peers}
    for number in range(repeats + 1):  # round 0 warms up
        for peer in [peer for peer in peers if peer.name in found]:
            report(f"where the time goes, {load.name}, round {number} of {repeats}: {peer.name}")
            seconds, times = peer.profile(prompts, load.new_tokens)
            if not times:
                found.pop(peer.name, None)
                continue
            spent, each = by_kind(times, seconds), dict(times)
            if load.new_tokens > 1:  # less what prefill took
                first_seconds, first = peer.profile(prompts, 1)
                before, before_each = by_kind(first, first_seconds), dict(first)
                spent = {kind: value - before[kind] for kind, value in spent.items()}
                each = {name: value - before_each.get(name, 0.0) for name, value in each.items()}
            if number:
                mine = found[peer.name]
                for kind, value in spent.items():
                    mine.ms[kind].append(1e3 * value / load.steps)
                longest = sorted(each.items(), key=lambda entry: -entry[1])[:_LONGEST]
                mine.longest.clear()
                mine.longest.update({name: 1e3 * value / load.steps for name, value in longest})
    return list(found.values())


def table_of(breakdowns: Sequence[Breakdown]) -> Table:
    """One row per load and peer."""
    from rich.table import Table

    table = Table(
        title="where the time goes, ms per prefill or decode step",
        caption="median of interleaved repeats (lowest–highest), under PyTorch's profiler, which costs time itself",
    )
    for heading in ("work", "whose", *KINDS):
        table.add_column(heading, justify="left" if heading in ("work", "whose") else "right")
    for one in breakdowns:
        table.add_row(one.load, one.peer, *(with_range(one.ms[kind], 1) for kind in KINDS))
    return table
