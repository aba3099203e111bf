"""A table that every front end shows, on the web as well: plain HTML, and text beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from splitwiser_lab.lab.display import publish
from splitwiser_lab.lab.report import number

_NOTHING = "n/a"


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show rows (column -> number, text or None) as a table; the first column names the row.

    Columns that hold nothing but "n/a" are left out. Raises ValueError when there is no row.
    """
    lines = _lines(rows)
    publish({"text/html": _html(lines), "text/plain": _text(lines)})


def table_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as HTML, for a widget. Raises ValueError when there is no row."""
    return _html(_lines(rows))


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    if not rows:
        raise ValueError("there is no row to show")
    cells = [{column: number(value) for column, value in row.items()} for row in rows]
    columns = [
        c for c in dict.fromkeys(c for row in cells for c in row) if {r.get(c, _NOTHING) for r in cells} != {_NOTHING}
    ]
    return [columns, *([row.get(column, _NOTHING) for column in columns] for row in cells)]


def _html(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ([escape(cell).replace(" (", "<br>(") for cell in line] for line in lines)
    parts = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    for first, *others in body:
        parts.append(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>")
    return f"<table><thead>{parts[0]}</thead><tbody>{''.join(parts[1:])}</tbody></table>"


def _text(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
