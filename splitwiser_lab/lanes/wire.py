"""How batches travel to a lane process: a decoding sequence in whole once, then only what is new of it.

Both ends remember the sequences of the last decode batch by their first page, which belongs to one
sequence alone for as long as it runs. One that goes on from where it was costs three numbers: first
page, token, and how many pages it got since. Everything else is sent in whole.
"""

from __future__ import annotations

import pickle
import select
from array import array
from dataclasses import dataclass
from multiprocessing.connection import Connection

from splitwiser_lab.lanes.child import Failure
from splitwiser_lab.model.batch import GREEDY, Batch, BatchResult, SamplingSpec, Sequence
from splitwiser_lab.model.graph_shapes import UsualWork

_Spec = tuple[float, float, float] | None
_Whole = tuple[list[int], int, list[int], _Spec]
_Known = tuple[int, list[int]]  # the position of a sequence's next token, and its pages
_NOBODY: _Known = (-1, [])
_IN_WHOLE = -1  # in place of the number of new pages
_NO_PAGE = -1


class Sender:
    """The end that packs. Give it each batch once, in the order in which they are sent."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}  # by first page

    def pack(self, batch: Batch, cores: list[int] | None) -> bytes:
        """A batch, and the cores to run it on, as bytes that the other end's Receiver understands."""
        numbers: list[int] = []
        whole: list[_Whole] = []
        specs: dict[int, _Spec] = {}
        known: dict[int, _Known] = {}
        for row, sequence in enumerate(batch.decode):
            table, start = sequence.block_table, sequence.start
            first = table[0] if table else _NO_PAGE
            position, pages = self._known.get(first, _NOBODY)
            new = _added(pages, table) if position == start else None
            if new is None:
                numbers += (first, 0, _IN_WHOLE)
                whole.append(_flat(sequence))
            else:
                (token,) = sequence.tokens
                numbers += (first, token, len(new), *new)
                if sequence.sampling is not GREEDY:
                    specs[row] = _spec(sequence.sampling)
            known[first] = (start + 1, list(table) if new != [] else pages)  # a copy: the caller's may grow
        self._known = known if batch.decode else self._known
        prefill = [_flat(sequence) for sequence in batch.prefill]
        return pickle.dumps((array("q", numbers).tobytes(), whole, specs, prefill, cores), pickle.HIGHEST_PROTOCOL)


class Receiver:
    """The end that unpacks, in the order of sending."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def unpack(self, data: bytes) -> tuple[Batch, list[int] | None]:
        """The batch that was packed, and its cores."""
        raw, whole, specs, prefill, cores = pickle.loads(data)
        numbers = array("q", raw).tolist()
        decode: list[Sequence] = []
        known: dict[int, _Known] = {}
        at, wholes = 0, iter(whole)
        while at < len(numbers):  # once for each sequence at each step: the fewest operations that do
            first, token, count = numbers[at], numbers[at + 1], numbers[at + 2]
            at += 3
            if count == _IN_WHOLE:
                sequence = _sequence(next(wholes))
                start, pages = sequence.start, sequence.block_table
            else:
                start, pages = self._known[first]
                if count:
                    pages = pages + numbers[at : at + count]
                    at += count
                spec = _sampling(specs[len(decode)]) if specs and len(decode) in specs else GREEDY
                sequence = Sequence([token], start, pages, spec)
            decode.append(sequence)
            known[first] = (start + 1, pages)
        if decode:
            self._known = known
        return Batch(decode, [_sequence(one) for one in prefill]), cores


_WORK = b"work"  # no pickle begins like this


def pack_work(work: UsualWork) -> bytes:
    """Ask for a warm-up; the answer is `Ready`."""
    return _WORK + pickle.dumps(work, pickle.HIGHEST_PROTOCOL)


def unpack_work(data: bytes) -> UsualWork | None:
    """The work to warm up for; None if these bytes are a batch."""
    if not data.startswith(_WORK):
        return None
    work: UsualWork = pickle.loads(data[len(_WORK) :])
    return work


@dataclass(frozen=True)
class Ready:
    """A worker's first answer, and that to a warm-up: how many batches may be under way there."""

    depth: int


Answer = Ready | Failure | BatchResult


def send_answer(connection: Connection, answer: Answer) -> None:
    """Send it; a result as a plain tuple, since there is one for each step."""
    plain = (answer.tokens, answer.start, answer.end) if isinstance(answer, BatchResult) else answer
    connection.send_bytes(pickle.dumps(plain, pickle.HIGHEST_PROTOCOL))


def receive_answer(connection: Connection) -> Answer:
    """The next answer. Raises EOFError or OSError when the other end is gone."""
    plain = pickle.loads(connection.recv_bytes())
    return BatchResult(*plain) if isinstance(plain, tuple) else plain


def has_come(connection: Connection) -> bool:
    """Whether something can be read, or the other end is gone. `Connection.poll` takes ten times as long to say so."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _added(pages: list[int], table: list[int]) -> list[int] | None:
    """What `table` has beyond `pages`; None if it does not begin with them."""
    if table == pages:
        return []
    return table[len(pages) :] if table[: len(pages)] == pages else None


def _spec(spec: SamplingSpec | None) -> _Spec:
    return None if spec is None else (spec.temperature, spec.top_p, spec.uniform)


def _flat(sequence: Sequence) -> _Whole:
    return sequence.tokens, sequence.start, sequence.block_table, _spec(sequence.sampling)


def _sequence(flat: _Whole) -> Sequence:
    tokens, start, table, spec = flat
    return Sequence(tokens, start, table, _sampling(spec))


def _sampling(spec: _Spec) -> SamplingSpec | None:
    return None if spec is None else SamplingSpec(*spec)
