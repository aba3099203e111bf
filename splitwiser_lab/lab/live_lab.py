"""The live lab in one call: an engine at work, its controls, and plots that move.

lab.live(engine)                                  # in a cell of its own
lab.live(engine, rate=2.0, prompt_tokens=256)     # how it begins; the controls change it
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import MODES, find_mode, supported_modes
from splitwiser_lab.hardware import Choice
from splitwiser_lab.lab.dashboard.knobs import Settings
from splitwiser_lab.lab.dashboard.session import Session
from splitwiser_lab.lab.dashboard.show import Dashboard, choose_drawing
from splitwiser_lab.measure.workload import Workload

_SECONDS_PER_MODE = 5.0
_shown: weakref.WeakValueDictionary[int, Dashboard] = weakref.WeakValueDictionary()  # by id of the engine


def live(
    engine: Engine,
    workload: Workload | None = None,
    *,
    seconds: float | None = None,
    schedule: Mapping[float, str] | None = None,
    reference: Any = None,
    **settings: Any,
) -> Dashboard:
    """Show an engine at work, with controls: flip the mode and watch lanes, latencies and hardware answer.

    Without a `workload`, prompts of this package keep coming; with one, its requests do, over and over. `settings`
    are how it begins: mode, rate (requests per second), prompt_tokens, output_tokens, options ({"chunk_tokens": 64}).
    Before the first request transformers is asked what the tokens should be (`reference`: the model to ask, for an
    engine whose model was given as an object), and every finished request is compared with that.

    In JupyterLab and VS Code the cell returns and the view lives on. Elsewhere (Colab, notebooks executed by a
    program) the cell draws for `seconds` and flips by `schedule` ({second: mode}; None: every mode in turn); calling
    it again begins with what was set last. Raises ModeError for a mode that does not run here.
    """
    previous = _shown.get(id(engine))
    begin = Settings(mode=engine.mode)
    if previous is not None:
        previous.close()
        begin = previous.source.settings if isinstance(previous.source, Session) else begin
    modes = [mode.mode for mode in supported_modes(engine.device) if mode.available and mode.mode != "auto"]
    plan = {_SECONDS_PER_MODE * n: mode for n, mode in enumerate(modes)} if schedule is None else dict(schedule)
    drawing, chosen = choose_drawing(), replace(begin, **settings)
    for mode in (chosen.mode, *plan.values()):  # before anything starts
        find_mode(mode, engine.device).check(chosen.options_of(MODES[mode]), engine.device)
    session = Session(engine, workload, chosen, reference)
    dashboard = _shown[id(engine)] = Dashboard(session, drawing)
    length = max(plan, default=0.0) + _SECONDS_PER_MODE if seconds is None else seconds
    present(dashboard, length, plan)
    return dashboard


def present(dashboard: Dashboard, seconds: float, schedule: Mapping[float, str]) -> None:
    """Show a dashboard in the way that its drawing says."""
    drawing: Choice = dashboard.drawing
    if drawing.value == "task":
        dashboard.show_live()
        dashboard.start()
    elif drawing.value == "cell with controls":
        dashboard.show_with_controls(seconds, schedule)
    else:
        dashboard.show_in_cell(seconds, schedule)
