"""What arrives is what was sent, whatever happened before; and what is known is not sent again."""

from __future__ import annotations

import random

import pytest

from splitwiser_lab.lanes.wire import Receiver, Sender
from splitwiser_lab.model.batch import GREEDY, Batch, SamplingSpec, Sequence


def step(start: int, table: list[int], token: int = 7, sampling: SamplingSpec | None = GREEDY) -> Sequence:
    return Sequence([token], start, table, sampling)


class Pair:
    """Both ends."""

    def __init__(self) -> None:
        self.sender, self.receiver = Sender(), Receiver()

    def send(self, batch: Batch) -> int:
        """Send it, check that it arrives, and give its size in bytes."""
        data = self.sender.pack(batch, [1, 3])
        assert self.receiver.unpack(data) == (batch, [1, 3])
        return len(data)


def test_a_sequence_that_goes_on_is_not_sent_again() -> None:
    pair, tables = Pair(), [list(range(1000 * i, 1000 * i + 300)) for i in range(32)]
    first = pair.send(Batch([step(9000, table) for table in tables], []))
    later = [pair.send(Batch([step(9000 + i, list(table)) for table in tables], [])) for i in range(1, 20)]
    assert max(later) < first / 10
    assert max(later) < 32 * 3 * 8 + 200


def test_a_table_that_the_caller_extends_in_place_arrives() -> None:
    pair, table = Pair(), [5, 3]
    for start in range(16, 40):
        pair.send(Batch([step(start, table)], []))
        if start % 8 == 7:
            table.append(100 + start)


@pytest.mark.parametrize(
    "second",
    [
        step(17, [5, 4]),  # another sequence that got the same first page
        step(18, [5, 3]),  # a step was left out
        step(16, [5, 3]),  # the same step again
        step(17, [5]),
        step(17, []),
        step(17, [5, 3, 9, 11]),
        step(17, [5, 3], token=-1),
        step(17, [5, 3], sampling=None),
        step(17, [5, 3], sampling=SamplingSpec(0.8, 0.9, 0.123456789)),
        step(17, [5, 3], token=10**12),
    ],
    ids=str,
)
def test_after_one_step_anything_may_come(second: Sequence) -> None:
    pair = Pair()
    pair.send(Batch([step(16, [5, 3])], []))
    pair.send(Batch([second], []))
    pair.send(Batch([step(second.start + 1, second.block_table)], []))


def test_a_prefill_between_two_steps_changes_nothing() -> None:
    pair = Pair()
    pair.send(Batch([step(16, [5, 3])], []))
    prompt = Sequence([1, 2, 3], 0, [8], None)
    pair.send(Batch([], [prompt]))
    small = pair.send(Batch([step(17, [5, 3])], []))
    assert small < pair.send(Batch([step(18, [5, 3])], [prompt, prompt]))
    pair.send(Batch([], []))


def test_sequences_come_and_go_and_are_preempted() -> None:
    """A long random life: pages are given back and taken by others, orders change, rounds are skipped."""
    numbers, pair = random.Random(3), Pair()
    free = list(range(40))
    running: list[tuple[list[int], int]] = []
    for _ in range(500):
        if free and numbers.random() < 0.3:
            running.append(([free.pop(numbers.randrange(len(free)))], numbers.randrange(8)))
        if running and numbers.random() < 0.2:
            table, _ = running.pop(numbers.randrange(len(running)))
            free += table
        numbers.shuffle(running)
        chosen = [one for one in running if numbers.random() < 0.9]
        batch = Batch([step(start, list(table), numbers.randrange(-1, 99)) for table, start in chosen], [])
        pair.send(batch)
        running = [one for one in running if one not in chosen]
        for table, start in chosen:
            if start % 8 == 7 and free:
                table.append(free.pop())
            running.append((table, start + 1))
