"""What all drawings of lanes share: the order of their rows, and what a change of mode is called."""

from __future__ import annotations

from collections.abc import Iterable

from splitwiser_lab.timeline import ModeChange

_USUAL = ("main", "prefill", "decode")


def lane_order(names: Iterable[str]) -> list[str]:
    """Each lane once, in the same order whenever it is drawn: the usual ones first."""
    known = {name: place for place, name in enumerate(_USUAL)}
    return sorted(set(names), key=lambda name: (known.get(name, len(known)), name))


def change_name(change: ModeChange) -> str:
    """The mode that begins, in mode `auto` the one that it chose."""
    return change.runs or change.mode
