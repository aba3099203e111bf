"""The numbers beside the plots, and the line about the tokens: as rows of text, and as HTML for a widget."""

from __future__ import annotations

from html import escape

from splitwiser_lab.lab.dashboard.frame import Frame
from splitwiser_lab.lab.palette import BAD, GOOD
from splitwiser_lab.lab.report import number
from splitwiser_lab.measure.stretch import Stretch

# heading -> (figure of a stretch, whether more is better)
COLUMNS = {
    "TTFT ms": ("ttft_ms", False),
    "TPOT ms": ("tpot_ms", False),
    "ITL ms": ("itl_ms", False),
    "ITL p99 ms": ("p99_itl_ms", False),
    "output tok/s": ("output_tokens_per_s", True),
    "overlap gain": ("overlap_gain", True),
}
_MATTERS = 1.05  # a change below five per cent is none
_ENOUGH = 3  # requests on either side of a flip, before anything is called better or worse
_NOTHING = "–"


def rows(frame: Frame) -> list[list[str]]:
    """Heading, the stretch before the latest flip, the one since, and how many times as much that is.

    TTFT, TPOT and ITL are medians.
    """
    head = ["medians", *COLUMNS, "requests"]
    lines = [head]
    if frame.before is not None:
        lines.append(_row("before", frame.before))
    if frame.after is not None:
        lines.append(_row("since" if frame.before else "so far", frame.after))
    if frame.before and frame.after:
        ratios = [_ratio(frame.before, frame.after, figure) for figure, _ in COLUMNS.values()]
        lines.append(["since / before", *(_NOTHING if r is None else f"×{r:.2f}" for r in ratios), ""])
    return lines


def better(frame: Frame, column: int) -> bool | None:
    """Whether the figure of this column (from 0, in the order of COLUMNS) got better.

    None where it hardly changed, and as long as too few requests have ended to tell.
    """
    figure, more_is_better = list(COLUMNS.values())[column]
    if not (frame.before and frame.after) or min(frame.before.completed, frame.after.completed) < _ENOUGH:
        return None
    ratio = _ratio(frame.before, frame.after, figure)
    if ratio is None or 1 / _MATTERS < ratio < _MATTERS:
        return None
    return (ratio > 1) == more_is_better


def status(frame: Frame) -> str:
    """What goes on, in one line."""
    said = {"preparing": "Preparing.", "running": "Running.", "stopped": "Stopped.", "failed": "Failed.", "ready": ""}
    under_way = f"{frame.running} request{'s' * (frame.running != 1)} under way, {frame.waiting} waiting."
    counts = under_way if frame.state == "running" else ""
    return " ".join(part for part in (said[frame.state], counts, frame.message) if part)


def said(frame: Frame) -> str:
    """Everything as plain text."""
    recorded = "RECORDED. " if frame.recorded else ""
    table = "\n".join("  ".join(f"{cell:>14}" for cell in line) for line in rows(frame))
    return f"{recorded}{frame.heading}\n{status(frame)}\ntokens {frame.tokens.text}\n{table}"


def sign(holds: bool | None) -> str:
    """One character before the line about the tokens."""
    return {True: "✓", False: "✗", None: "…"}[holds]


def html(frame: Frame) -> str:
    """Heading, status, the line about the tokens, and the table, for an HTML widget on a light or a dark page."""
    colour = {True: GOOD, False: BAD, None: "inherit"}[frame.tokens.holds]
    badge = '<span class="recorded" style="border:1px solid;border-radius:3px;padding:0 4px">RECORDED</span> '
    tokens = f'<b style="color:{colour}">{sign(frame.tokens.holds)}</b> tokens {escape(frame.tokens.text)}'
    return (
        f'<div class="splitwiser-numbers" style="line-height:1.5;font-size:13px">'
        f"<div>{badge if frame.recorded else ''}<b>{escape(frame.heading)}</b></div>"
        f'<div class="splitwiser-status">{escape(status(frame))}</div>'
        f'<div class="splitwiser-tokens" data-holds="{frame.tokens.holds}">{tokens}</div>{_table(frame)}</div>'
    )


def _table(frame: Frame) -> str:
    head, *body = rows(frame)
    if not body:
        return ""
    lines = ["".join(_cell("th", escape(text)) for text in head)]
    lines += ["".join(_cell("td", escape(text)) for text in line) for line in body[:2]]
    lines += ["".join(_cell("td", _judged(frame, n - 1, text)) for n, text in enumerate(line)) for line in body[2:]]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table style="border-collapse:collapse;font-size:12px">{table}</table>'


def _cell(tag: str, content: str) -> str:
    return f'<{tag} style="padding:1px 6px;text-align:right;white-space:nowrap">{content}</{tag}>'


def _judged(frame: Frame, column: int, text: str) -> str:
    """The ratio, and in words and colour whether that is better or worse."""
    good = better(frame, column) if 0 <= column < len(COLUMNS) else None
    if good is None:
        return escape(text)
    mark = f'<span style="color:{GOOD if good else BAD}">●</span>'
    return f"{escape(text)} {mark} {'better' if good else 'worse'}"


def _row(name: str, stretch: Stretch) -> list[str]:
    values = [getattr(stretch, figure) for figure, _ in COLUMNS.values()]
    texts = [_NOTHING if value is None else number(float(value)) for value in values]
    return [f"{name}: {stretch.label}, {stretch.seconds:.0f} s", *texts, str(stretch.completed)]


def _ratio(before: Stretch, after: Stretch, figure: str) -> float | None:
    old, new = getattr(before, figure), getattr(after, figure)
    return new / old if old and new is not None else None
