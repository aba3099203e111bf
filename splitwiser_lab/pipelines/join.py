"""Join the documents of one reproduction that ran in parts: the same work, machine, versions and commit, or nothing.

What ran in several parts, `sequential` above all, keeps the rounds of each: its spread then holds what the machine
drifted between the parts. Each part's ratios were taken against its own `sequential`, in its own rounds. Parts may be
incomplete: what one left out, another may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitwiser_lab.errors import RecordingError
from splitwiser_lab.pipelines.document import NOT_RUN, Reproduction
from splitwiser_lab.pipelines.rows import LeftOut, Row

_SAME = ("hardware", "versions", "commit")  # of the origins


def join_files(paths: Sequence[str | Path]) -> Reproduction:
    """Read parts that `reproduce --json` wrote, and join them in this order.

    Raises RecordingError where parts do not belong together, with what differs, or a file cannot be read.
    """
    return join([Reproduction.load(path) for path in paths], [Path(path).name for path in paths])


def join(parts: Sequence[Reproduction], names: Sequence[str]) -> Reproduction:
    """One document of all `parts`, which errors call by their `names`. Raises RecordingError as `join_files`."""
    if not parts:
        raise RecordingError("there is nothing to join: name files that `reproduce --json` wrote.")
    first = parts[0]
    for part, name in zip(parts[1:], names[1:], strict=True):
        if difference := _difference(first, part):
            raise RecordingError(
                f"{names[0]} and {name} are no parts of one reproduction: {difference}. Run it again like the rest."
            )
    rows: dict[tuple[str, int, float | None], Row] = {}
    for row in (row for part in parts for row in part.rows):
        key = (row.name, row.output, row.rate)
        rows[key] = _pooled(rows[key], row) if key in rows else row
    order = list(dict.fromkeys((output, rate) for _, output, rate in rows))
    return Reproduction(
        first.pipeline,
        first.work,
        tuple(sorted(rows.values(), key=lambda row: order.index((row.output, row.rate)))),
        {name: why for part in parts for name, why in part.skipped.items() if not _ran(name, rows)},
        first.origin | {"versions": _versions(parts), "command": " ; ".join(p.origin["command"] for p in parts)},
        next((part.phases for part in parts if part.phases), ()),
        tuple(_origins(parts)),
        _left_out(parts, rows.values()),
    )


def _difference(a: Reproduction, b: Reproduction) -> str | None:
    """What keeps two documents from being parts of one, with both values."""
    pairs: list[tuple[str, Any, Any]] = [("pipeline", a.pipeline, b.pipeline), ("work", str(a.work), str(b.work))]
    pairs.append(("seed", a.work.seed, b.work.seed))
    for what in _SAME:
        mine, other = a.origin[what], b.origin[what]
        if isinstance(mine, dict) and isinstance(other, dict):
            pairs += [(f"{what}, {key}", mine.get(key), other.get(key)) for key in {**mine, **other}]
        else:
            pairs.append((what, mine, other))
    unlike = ((what, a, b) for what, a, b in pairs if a != b and NOT_RUN not in (a, b))
    return next((f"{what} is {a!r} in one, {b!r} in the other" for what, a, b in unlike), None)


def _versions(parts: Sequence[Reproduction]) -> dict[str, str]:
    """Those of any part: all have the same, but for what only some came to run."""
    known = [(name, version) for part in parts for name, version in part.origin["versions"].items()]
    return {**dict(known), **{name: version for name, version in known if version != NOT_RUN}}


def _pooled(a: Row, b: Row) -> Row:
    """The rounds of both."""
    samples = {name: [*a.samples.get(name, []), *b.samples.get(name, [])] for name in {**a.samples, **b.samples}}
    differences, unexplained = a.differences + b.differences, a.unexplained + b.unexplained
    different = a.different + b.different
    return replace(a, samples=samples, different=different, differences=differences, unexplained=unexplained)


def _left_out(parts: Sequence[Reproduction], rows: Iterable[Row]) -> tuple[LeftOut, ...]:
    """What parts left out and no other has: by now there are fewer rounds of it than were wanted."""
    done = {row.what: row.repeats for row in rows}
    left: dict[str, LeftOut] = {}
    for each in (each for part in parts for each in part.left_out):
        if done.get(each.what, 0) < each.rounds:
            left.setdefault(each.what, each)
    return tuple(left.values())


def _ran(name: str, rows: dict[tuple[str, int, float | None], Row]) -> bool:
    """Whether what one part left out ran in another: `name`, or `name, N new tokens`."""
    return any(name in (row.name, f"{row.name}, {row.output} new tokens") for row in rows.values())


def _origins(parts: Sequence[Reproduction]) -> list[dict[str, Any]]:
    """Command and time of each piece; of joined documents, those of their parts."""
    pieces: list[dict[str, Any]] = []
    for part in parts:
        pieces += part.parts or [{"command": part.origin["command"], "time_utc": part.origin["time_utc"]}]
    return pieces
