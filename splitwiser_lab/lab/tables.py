"""A table that every front end shows, on the web as well: plain HTML, and text beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from splitwiser_lab.lab.display import publish
from splitwiser_lab.lab.report import number

_NOTHING = "n/a"
_PROSE = 30  # letters: a column with a longer cell is read as text, from the left
_LEFT = ' style="text-align:left"'


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show rows (column -> number, text or None) as a table; the first column names the row.

    Columns that hold nothing but "n/a" or empty text are left out. Raises ValueError when there is no row.
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
        c
        for c in dict.fromkeys(c for row in cells for c in row)
        if not {r.get(c, _NOTHING) for r in cells} <= {_NOTHING, ""}
    ]
    return [columns, *([row.get(column, _NOTHING) for column in columns] for row in cells)]


def _html(lines: Sequence[Sequence[str]]) -> str:
    prose = [max(map(len, column)) > _PROSE for column in zip(*lines[1:], strict=True)]
    head, *body = ([_cell(cell) for cell in line] for line in lines)

    def row(cells: Sequence[str], tags: Sequence[str]) -> str:
        parts = zip(cells, tags, prose, strict=True)
        return "".join(f"<{tag}{_LEFT if left else ''}>{cell}</{tag}>" for cell, tag, left in parts)

    tags = ["th", *["td"] * (len(head) - 1)]
    rows = "".join(f"<tr>{row(cells, tags)}</tr>" for cells in body)
    return f"<table><thead><tr>{row(head, ['th'] * len(head))}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(text: str) -> str:
    """Escaped; a bracket at the end is on a line of its own, and a range whole."""
    return re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", re.sub(r" \((?=[^()]*\)$)", "<br>(", escape(text)))


def _text(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
