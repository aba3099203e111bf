"""What a notebook needs besides the package itself: one set-up call, pictures, guesses, exercises.

    from splitwiser_lab import lab

    here = lab.setup()

Names are loaded when first used, so that drawing libraries load only where something is drawn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from splitwiser_lab.lab.setup import setup  # at once: the module of the same name would hide the function

if TYPE_CHECKING:
    from splitwiser_lab.lab.compare_view import compare
    from splitwiser_lab.lab.display import show
    from splitwiser_lab.lab.exercises import check
    from splitwiser_lab.lab.guesses import bars, reveal
    from splitwiser_lab.lab.live_lab import flip, live, recorded, replay
    from splitwiser_lab.lab.tables import table
    from splitwiser_lab.lab.views import profile, roofline

_HOMES = {
    "bars": "guesses",
    "check": "exercises",
    "compare": "compare_view",
    "flip": "live_lab",
    "live": "live_lab",
    "profile": "views",
    "recorded": "live_lab",
    "replay": "live_lab",
    "reveal": "guesses",
    "roofline": "views",
    "show": "display",
    "table": "tables",
}

__all__ = [
    "bars",
    "check",
    "compare",
    "flip",
    "live",
    "profile",
    "recorded",
    "replay",
    "reveal",
    "roofline",
    "setup",
    "show",
    "table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
