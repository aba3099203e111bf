"""The two phases as two functions, on any lane: what the engine does at scale, one sequence at a time.

For learning and for tests. Whoever calls them plays the engine: it owns the block table, and hands it
from one phase to the other.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from splitwiser_lab.lanes.base import Lane, Ticket
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence


def prefill(lane: Lane, prompt: SequenceOf[int], block_table: SequenceOf[int]) -> Ticket:
    """Start the prefill of a whole prompt; the ticket's result holds the first new token.

    Keys and values of all prompt tokens are written to the pages named in `block_table`.
    """
    return lane.submit(Batch([], [Sequence(list(prompt), 0, list(block_table), GREEDY)]))


def decode_one_token(lane: Lane, token: int, position: int, block_table: SequenceOf[int]) -> Ticket:
    """Start one decode step: `token`, at `position`, reads all keys and values before it and asks for the next."""
    return lane.submit(Batch([Sequence([token], position, list(block_table), GREEDY)], []))
