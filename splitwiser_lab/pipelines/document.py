"""What a reproduction leaves behind: one row for each way to do the work, where it ran, and what it means in words.

Both pipelines write this document. It knows neither of them, and reads back what it wrote, so that parts that
were run one by one can be joined and notebooks can show recordings.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from splitwiser_lab.errors import RecordingError
from splitwiser_lab.measure.compare import with_range
from splitwiser_lab.measure.document import Document
from splitwiser_lab.pipelines.budget import reason_of
from splitwiser_lab.pipelines.ceiling import Ceiling
from splitwiser_lab.pipelines.phase_figures import PhaseFigures, missing_reasons, phase_rows
from splitwiser_lab.pipelines.rows import BASE, LeftOut, Row, Work
from splitwiser_lab.pipelines.winners import winners

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "splitwiser-lab/reproduction/1"
ORIGIN = ("hardware", "versions", "command", "commit", "time_utc")  # of where and how it was measured
NOT_RUN = "not run"  # the version of what a run did not come to
_RANGED = ("output_throughput", "over_sequential", "steady_output_throughput")  # shown with lowest and highest
_COLUMNS = {  # of the table: heading -> (figure, digits)
    "output tok/s": ("output_throughput", 1),
    "× sequential": ("over_sequential", 2),
    "steady": ("steady_output_throughput", 1),
    "TTFT p50 ms": ("median_ttft_ms", 0),
    "ITL p50 ms": ("median_itl_ms", 1),
    "hand-off ms": ("hand_off_write_ms", 1),
    "start s": ("spawn_s", 1),
    "own GB": ("private_gb", 1),
}
_ONE_BY_ONE = {"TTFT p99 ms": ("p99_ttft_ms", 0), "ITL p99 ms": ("p99_itl_ms", 1)}  # besides, where requests come so


@dataclass(frozen=True)
class Reproduction(Document):
    """What `reproduce` found. Print its `table` and `notes`, or write it with `to_json`.

    `skipped` says what could not run, and why; `left_out` what was not measured, or not in every round: a run that
    ended early, or had no time for it. `phases` is what each phase does alone; `parts` are the origins
    of the documents that were joined into this one (none: it was measured in one piece).
    """

    pipeline: str
    work: Work
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    origin: dict[str, Any]
    phases: tuple[PhaseFigures, ...] = ()
    parts: tuple[dict[str, Any], ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def unexplained(self) -> list[str]:
        """Rows with a token that differs from the reference's where precision does not explain it."""
        return [row.name for row in self.rows if row.unexplained]

    def missing(self) -> list[str]:
        """What could not run and what was left out, in lines, one for each reason and number of rounds."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(("", why), []).append(name)
        done = {row.what: row.repeats for row in self.rows}
        for left in self.left_out:
            after = f" after {done[left.what]} of {left.rounds} rounds" if left.what in done else ""
            reasons.setdefault((after, reason_of(left.why)), []).append(left.what)
        return [f"left out{after}: {'; '.join(names)}: {why}" for (after, why), names in reasons.items()]

    def row(self, name: str, output: int, rate: float | None = None) -> Row | None:
        """The row of this name, output length and rate of arrivals, if there is one."""
        return next((row for row in self.rows if (row.name, row.output, row.rate) == (name, output, rate)), None)

    def ceiling(self, row: Row) -> Ceiling | None:
        """The most that a row of mode `split` can gain over taking turns; None for others, or without the times."""
        base = self.row(BASE, row.output, row.rate)
        if row.mode != "split" or base is None or self.pipeline == "vllm":
            return None
        prefill_s, decode_s = base.figure("prefill_seconds"), base.figure("decode_seconds")
        if not prefill_s or not decode_s:
            return None
        return Ceiling(prefill_s, decode_s, row.processes, self.work.batches)

    def notes(self) -> list[str]:
        """What the table means, in sentences: what `split` could gain and got, and what `replicas` got beside it.

        Of vLLM's engines, whose batches change at every step, who was best at what.
        """
        found = winners(self.rows) if self.pipeline == "vllm" else []
        for row in self.rows:
            gain, ceiling = row.figure("over_sequential"), self.ceiling(row)
            if gain is None or ceiling is None:
                continue
            other = self._rival(row)
            beside = other.figure("over_sequential") if other else None
            rival = f" {other.name} got {beside:.2f}, bound by no phase." if other and beside else ""
            above = " It got more: in its own process a phase was faster, or the machine drifted."
            above = above if gain > ceiling.run else ""
            found.append(f"{row.output} new tokens, {row.name}: {gain:.2f} × sequential; {ceiling}.{above}{rival}")
        return found

    def _rival(self, row: Row) -> Row | None:
        """Replicas with as many processes and as much MPS."""
        like = (row.output, row.processes, row.mps)
        rivals = (r for r in self.rows if r.mode == "replicas" and (r.output, r.processes, r.mps) == like)
        return next(rivals, None)

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, ready for JSON."""
        rows = []
        for row in self.rows:
            ceiling = self.ceiling(row)
            rows.append(row.to_dict() | ({"ceiling": ceiling.to_dict()} if ceiling else {}))
        return {
            "schema": SCHEMA,
            "pipeline": self.pipeline,
            **asdict(self.work),
            "rows": rows,
            "skipped": self.skipped,
            "left_out": [asdict(left) for left in self.left_out],
            "phases": [phase.to_dict() for phase in self.phases],
            "parts": list(self.parts),
            **self.origin,
        }

    @classmethod
    def load(cls, path: str | Path) -> Reproduction:
        """Read what `to_json` wrote. Raises RecordingError when the file is something else, or damaged."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordingError(f"{path} is not JSON ({error}): give a file that `reproduce --json` wrote.") from error
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise RecordingError(
                f"{path} has schema {schema!r}, not {SCHEMA!r}: give a file that `reproduce --json` wrote."
            )
        try:
            return cls(
                raw["pipeline"],
                Work(**{name: raw[name] for name in Work.__dataclass_fields__ if name in raw}),
                tuple(Row.from_dict(row) for row in raw["rows"]),
                raw["skipped"],
                {name: raw[name] for name in ORIGIN},
                tuple(PhaseFigures.from_dict(phase) for phase in raw["phases"]),
                tuple(raw["parts"]),
                tuple(LeftOut(**left) for left in raw.get("left_out", [])),
            )
        except (KeyError, TypeError) as error:
            raise RecordingError(f"{path} is damaged or cut off ({error!r}): record it anew.") from error

    def table_rows(self) -> list[dict[str, Any]]:
        """One row per way to do the work, medians with the range over the rounds in brackets; for any table."""
        rows, some_come_later = [], any(row.rate for row in self.rows)
        some_have_fewer = len({row.repeats for row in self.rows}) > 1
        columns = _COLUMNS | (_ONE_BY_ONE if some_come_later else {})
        for row in self.rows:
            cells: dict[str, Any] = {"": row.name, "out": row.output}
            if some_have_fewer:
                cells["rounds"] = row.repeats
            if some_come_later:
                cells["arrivals/s"] = f"{row.rate:.3g}" if row.rate else "all at once"
            for heading, (figure, digits) in columns.items():
                cells[heading] = _cell(row.samples.get(figure, []), digits, figure in _RANGED)
                if heading == "× sequential":
                    ceiling = self.ceiling(row)
                    cells["at most"] = f"{ceiling.run:.2f}" if ceiling else "n/a"
            count = row.different
            rows.append(cells | {"tokens": "identical" if not count else f"{count} differ"})
        return rows

    def tables(self) -> list[Table]:
        """For a terminal: the rows, and what each phase does alone; columns with nothing in them are left out."""
        counts = sorted({row.repeats for row in self.rows})
        rounds = "–".join(str(count) for count in dict.fromkeys((*counts[:1], *counts[-1:])))
        of_rounds = f"median of {rounds} interleaved rounds (lowest–highest)" if rounds != "1" else "one round each"
        caption = (
            f"{of_rounds}; starts are outside the timer, hand-offs inside; "
            "tokens against the reference's on the same batches"
        )
        missing = "".join(f"; {reason}" for reason in missing_reasons(self.phases))
        alone = f"each phase of one batch alone, ms as median (lowest–highest){missing}"
        tables = [(self.table_rows(), f"{self.pipeline}: {self.work}", caption), (phase_rows(self.phases), "", alone)]
        return [_table(rows, title, caption) for rows, title, caption in tables if rows]


def _cell(values: list[float], digits: int, ranged: bool) -> str:
    """Median in a few digits, with the range if it is wanted and there is one to see."""
    digits = 0 if values and max(values) >= 1000 else digits
    same = len({f"{value:.{digits}f}" for value in values}) == 1
    return with_range(values if ranged and not same else [median(values)] if values else [], digits)


def _table(rows: list[dict[str, Any]], title: str, caption: str) -> Table:
    from rich.table import Table

    table = Table(title=title, caption=caption)
    lines = [{heading: str(cell).replace(" (", "\n(") for heading, cell in row.items()} for row in rows]
    headings = [heading for heading in lines[0] if {line[heading] for line in lines} != {"n/a"}]
    for heading in headings:
        left = heading in ("", "alone", "tokens")
        # Headings and names wrap where there is no room; figures and words never do.
        parts = [part for line in lines for part in (line[heading].split() if left else line[heading].splitlines())]
        table.add_column(heading, justify="left" if left else "right", min_width=max(map(len, parts)))
    for line in lines:
        table.add_row(*(line[heading] for heading in headings))
    return table
