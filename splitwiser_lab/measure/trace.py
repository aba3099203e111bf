"""Reading a request trace in the format of the Azure Public Dataset. Knows no workload."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from splitwiser_lab.errors import WorkloadError

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_trace(path: Path, limit: int | None = None) -> list[tuple[datetime, int, int]]:
    """Time, input and output tokens of the first `limit` rows (None: all) of a .csv or .csv.gz file.

    Raises WorkloadError when the file cannot be read, lacks a column or has no rows, and, with the line,
    for a row that makes no sense.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8-sig") as lines:
            rows = _rows(path, lines, limit)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        url = "https://github.com/Azure/AzurePublicDataset (folder data)"
        raise WorkloadError(f"{path} cannot be read as a .csv or .csv.gz trace ({error}); get one at {url}") from error
    if not rows:
        raise WorkloadError(f"{path} has a header but no rows; give a trace with at least one request")
    return rows


def _rows(path: Path, lines: Iterable[str], limit: int | None) -> list[tuple[datetime, int, int]]:
    """Time, input and output tokens of each row."""
    reader = csv.DictReader(lines)
    header, wanted = ",".join(reader.fieldnames or ()), ",".join(_COLUMNS)
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise WorkloadError(f"{path} has the wrong columns, {header!r}: rename them, the first line must be {wanted!r}")
    rows = []
    for row in islice(reader, limit):
        try:
            time, (prompt, output) = datetime.fromisoformat(row[_COLUMNS[0]]), (int(row[c]) for c in _COLUMNS[1:])
            if prompt < 1 or output < 1:
                raise ValueError("lengths start at 1")
        except (TypeError, ValueError) as error:
            raise WorkloadError(
                f"{path}, line {reader.line_num}: {','.join(map(str, row.values()))!r} is not a request ({error}); "
                "it must read like '2023-11-16 18:15:46.6805900,374,44': correct the line or delete it"
            ) from error
        rows.append((time if time.tzinfo else time.replace(tzinfo=UTC), prompt, output))
    return rows
