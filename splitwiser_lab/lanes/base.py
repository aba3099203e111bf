"""A lane: a place where batches execute. It takes a batch and gives a ticket; it knows no scheduling."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Protocol, runtime_checkable

from splitwiser_lab.model.batch import Batch, BatchResult
from splitwiser_lab.model.graph_shapes import UsualWork

_POLL_SECONDS = 50e-6  # between two looks at a GPU's events


@runtime_checkable
class Ticket(Protocol):
    """A batch under way."""

    def done(self) -> bool:
        """Whether `result` would return at once."""
        ...

    def result(self) -> BatchResult:
        """Wait for the batch. Raises LaneError when the lane failed."""
        ...

    def connection(self) -> Connection | None:
        """What becomes readable when the batch is done, or None when `done` must be asked again and again."""
        ...


class Lane(Protocol):
    """Where batches execute, one after the other, in the order in which they were submitted."""

    name: str
    cores: list[int]  # of the CPU, for lanes that have a share of them; may change between two batches

    @property
    def depth(self) -> int:
        """Batches that may be submitted before their tickets are done.

        A lane of more than one takes `PENDING` tokens from the batch that picked them.
        """
        ...

    def start(self) -> None:
        """Make the lane ready, waiting where it takes long. Raises LaneError with the reason it cannot be."""
        ...

    def warm_up(self, work: UsualWork) -> None:
        """Make what such batches need beforehand, where there is such a thing. Only while no batch is under way."""
        ...

    def submit(self, batch: Batch) -> Ticket:
        """Start a batch. Raises LaneError when the lane is dead."""
        ...

    def close(self) -> None:
        """Give back everything; leave no process and no memory. A closed lane can be started again."""
        ...


def spread(batch: Batch, picked: list[int]) -> list[int | None]:
    """One entry per sequence: its picked token, or None where none was asked for."""
    tokens = iter(picked)
    return [None if s.sampling is None else next(tokens) for s in batch.sequences]


def wait_any(tickets: Sequence[Ticket], timeout: float | None = None) -> None:
    """Return when one of the tickets is done, or after `timeout` seconds."""
    if any(ticket.done() for ticket in tickets):
        return
    connections = [c for ticket in tickets if (c := ticket.connection()) is not None]
    if len(connections) == len(tickets):
        wait(connections, timeout)
        return
    deadline = None if timeout is None else time.perf_counter() + timeout
    while not any(ticket.done() for ticket in tickets):
        if deadline is not None and time.perf_counter() > deadline:
            return
        time.sleep(_POLL_SECONDS)
