"""One HTML file that tells a whole comparison: machine, figures, Gantts, texts, losses.

The file stands alone: no script, no font, no picture from elsewhere, and a content policy that forbids
any. This module measures nothing and decides nothing; it shows what it is given, and escapes all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from splitwiser_lab.lab.static import gantt_svg
from splitwiser_lab.timeline import Timeline

Mark = Literal["best", "worst", ""]

_LONG_TEXT = 700  # characters of a prompt that are shown unfolded
_MORE_IS_BETTER = re.compile(r"throughput|goodput|gain|completed|tok(ens)?/s|req(uests)?/s|per_s$|per second")
_LESS_IS_BETTER = re.compile(r"ttft|tpot|itl|e2el|latency|duration|preempt|failed|\bms\b|_ms$|seconds|_s$|\(s\)")
_DEFINITIONS = {
    "ttft": "TTFT: from a request's arrival to its first token.",
    "tpot": "TPOT: time per token after the first, one mean per request.",
    "itl": "ITL: the gap between two tokens of a request, pooled over all requests; its maximum is the worst stall.",
    "e2el": "E2EL: from a request's arrival to its last token.",
    "goodput": "Goodput: completed requests per second that keep the limits given.",
    "gain": "Overlap gain: prefill rate over its rate alone, plus decode rate over its rate alone. Taking turns gives "
    "1, perfect overlap 2; below 1, sharing costs more than it brings.",
}


def write_report(
    path: str | Path,
    title: str,
    hardware: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    timelines: Mapping[str, Timeline],
    texts: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> Path:
    """Write the report and return its path; folders on the way are made.

    hardware   name -> value, shown in order; `command` and `commit` as code; a mapping (versions) as a list
    rows       the table, one mapping per mode: column -> number, text, bool or None; the first column names the row
    timelines  mode -> timeline, drawn over one time axis
    texts      one mapping per prompt: `prompt`, `text` (the reference), `identical` {mode: True, False, None
               (not compared) or a reason}, and optionally `texts` {mode: text} for what differs
    notes      plain sentences; losses belong here as much as wins

    Raises OSError when the file cannot be written.
    """
    sections = [
        ("What ran", _hardware(hardware)),
        ("Modes compared", _table(rows) if rows else ""),
        ("When each phase ran", f'<div class="wide">{gantt_svg(timelines, 960)}</div>' if timelines else ""),
        ("What was written", "".join(_text(text) for text in texts)),
        ("Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""),
    ]
    body = "\n".join(f"<section><h2>{name}</h2>\n{content}</section>" for name, content in sections if content)
    page = _PAGE.format(title=escape(title), style=_STYLE, body=body)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def number(value: Any) -> str:
    """A figure as people read it: three digits or all before the point, thousands apart, None as n/a."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def marks(column: str, values: Sequence[Any]) -> list[Mark]:
    """Which values of a column are its best and worst, for columns where one direction is better.

    Nothing is marked where all read the same, and no worst among two.
    """
    name = column.lower()
    sign = 1 if _MORE_IS_BETTER.search(name) else -1 if _LESS_IS_BETTER.search(name) else 0
    figures = [sign * v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not sign or len(figures) < 2 or number(max(figures)) == number(min(figures)):
        return [""] * len(values)
    names: dict[str, Mark] = {number(min(figures)): "worst" if len(figures) > 2 else "", number(max(figures)): "best"}
    numeric = (isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return [names.get(number(sign * v), "") if ok else "" for v, ok in zip(values, numeric, strict=True)]


def _hardware(hardware: Mapping[str, Any]) -> str:
    items = []
    for name, value in hardware.items():
        kind = ' class="row"' if isinstance(value, Mapping) or name == "command" else ""
        if isinstance(value, Mapping):
            shown = escape(" · ".join(f"{key} {number(v)}" for key, v in value.items()))
        else:
            shown = escape(str(value))
        if name in ("command", "commit"):
            shown = f"<code>{shown}</code>"
        items.append(f"<div{kind}><dt>{escape(name.replace('_', ' '))}</dt><dd>{shown}</dd></div>")
    return f"<dl>{''.join(items)}</dl>" if items else ""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    judged = {column: marks(column, [row.get(column) for row in rows]) for column in columns}
    head = "".join(f'<th scope="col">{escape(column.replace("_", " "))}</th>' for column in columns)
    lines = []
    for index, row in enumerate(rows):
        cells = [f'<th scope="row">{escape(number(row.get(columns[0])))}</th>']
        for column in columns[1:]:
            mark = judged[column][index]
            tag = f' <small class="{mark}">{mark}</small>' if mark else ""
            kind = "" if isinstance(row.get(column), str) else ' class="number"'
            cells.append(f"<td{kind}>{escape(number(row.get(column)))}{tag}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    named = " ".join(columns).lower()
    meanings = "".join(f"<li>{escape(text)}</li>" for key, text in _DEFINITIONS.items() if key in named)
    legend = f"<details><summary>What the columns mean</summary><ul>{meanings}</ul></details>" if meanings else ""
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>{legend}'
    )


def _text(text: Mapping[str, Any]) -> str:
    states = "".join(_state(mode, state) for mode, state in text.get("identical", {}).items())
    others = "".join(
        f'<h4>{escape(mode)} wrote</h4><pre class="other">{escape(str(other))}</pre>'
        for mode, other in text.get("texts", {}).items()
        if other != text["text"]
    )
    return (
        f'<article><h3>Prompt</h3>{_folded(str(text["prompt"]))}<h3>Text</h3><pre class="answer">'
        f'{escape(str(text["text"]))}</pre>{others}<ul class="states">{states}</ul></article>'
    )


def _state(mode: str, state: bool | str | None) -> str:
    if state is None:
        kind, sign, said = "unknown", "–", "not compared"
    elif isinstance(state, str):
        kind, sign, said = "explained", "≈", state
    else:
        kind, sign, said = ("same", "✓", "identical tokens") if state else ("differs", "✗", "tokens differ")
    return f'<li class="{kind}"><b>{sign} {escape(mode)}</b> {escape(said)}</li>'


def _folded(text: str) -> str:
    block = f"<pre>{escape(text)}</pre>"
    if len(text) <= _LONG_TEXT:
        return block
    start = escape(" ".join(text[:140].split()))
    return f"<details><summary>{start}… ({len(text):,} characters)</summary>{block}</details>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --text: #1f2328; --soft: #59636e; --page: #ffffff; --box: #f6f8fa; --line: #d1d9e0;
  --good: #0f6b3e; --bad: #b3261e; --odd: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9aa5b1; --page: #0d1117; --box: #161b22;
  --line: #30363d; --good: #57d496; --bad: #ff8f85; --odd: #f0c064; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 2.5rem 1.5rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .9rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
h3, h4 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: .9rem 0 .3rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: .7rem 2rem; margin: 0; }
dl .row { grid-column: 1 / -1; }
dt { font-size: .8rem; color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { font-size: .8rem; color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.number, thead th:not(:first-child) { text-align: right; }
td small { display: block; font-size: .72rem; font-weight: 600; white-space: nowrap; }
.best { color: var(--good); } .best::before { content: "▲ "; }
.worst { color: var(--bad); } .worst::before { content: "▽ "; }
svg.gantt { max-width: 100%; min-width: 620px; height: auto; display: block; } svg.gantt text { fill: var(--text); }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; max-width: 75ch; }
article { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .3rem 1.1rem .8rem;
  margin: 0 0 1rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; } pre.answer { font-weight: 600; }
ul.states { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; margin: .9rem 0 0;
  font-size: .85rem; }
.same b { color: var(--good); } .differs b { color: var(--bad); } .explained b { color: var(--odd); }
"""
