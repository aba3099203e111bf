"""The live lab in one call: an engine at work, its controls, and plots that move.

lab.live(engine)                                  # in a cell of its own
lab.live(engine, rate=2.0, prompt_tokens=256)     # how it begins; the controls change it
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import MODES, find_mode, supported_modes
from splitwiser_lab.errors import RecordingError, SplitwiserError
from splitwiser_lab.hardware import Choice
from splitwiser_lab.lab.dashboard.frame import Frame
from splitwiser_lab.lab.dashboard.knobs import Settings
from splitwiser_lab.lab.dashboard.recorded import Replay, in_order
from splitwiser_lab.lab.dashboard.session import Session
from splitwiser_lab.lab.dashboard.show import Dashboard, choose_drawing
from splitwiser_lab.measure import shipped
from splitwiser_lab.measure.recording import Recording, by_work, recordings
from splitwiser_lab.measure.stretch import Stretch
from splitwiser_lab.measure.workload import Workload

_SECONDS_PER_MODE, _PREPARE_SECONDS = 5.0, 600.0
_ENOUGH = 2  # requests that have to end on either side of a flip
_SHIPPED = ("recordings/h200", "recordings/cpu")
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


def replay(
    recorded: Recording | Sequence[Recording] | str | Path | None = None,
    *,
    seconds: float = 6.0,
    schedule: Mapping[float, str] | None = None,
) -> Dashboard:
    """The live view over recorded runs: flip the mode, and it goes on in that mode's recording at the same moment.

    `recorded` is a recording, several, a file or a folder; None takes those of the H200 that come with the package,
    or of a CPU. What is shown says everywhere that it is recorded, on which machine, and when. Elsewhere than in
    JupyterLab and VS Code the runs are shown in `seconds` until one of them ends, with flips by `schedule`
    ({second: mode}; None: every mode in turn). Raises RecordingError when there is nothing to play.
    """
    runs = _recordings(recorded)
    drawing = choose_drawing()
    source = Replay(runs)
    modes = [mode.mode for mode in source.modes if mode.available]
    if drawing.value != "task":
        source = Replay(runs, speed=source.shortest / seconds)
    plan = {seconds * n / len(modes): mode for n, mode in enumerate(modes)} if schedule is None else dict(schedule)
    dashboard = Dashboard(source, drawing)
    present(dashboard, seconds, plan)
    return dashboard


def recorded(folder: str | Path | None = None) -> dict[str, Recording]:
    """Recorded runs of the same work by mode: of a folder, or (None) those that `replay` shows first.

    Raises RecordingError when there are none.
    """
    works = by_work(_recordings(folder))
    return in_order(max(works.values(), key=len))


def _recordings(recorded: Recording | Sequence[Recording] | str | Path | None) -> list[Recording]:
    if isinstance(recorded, Recording):
        return [recorded]
    if recorded is None:
        found = next((place for name in _SHIPPED if (place := shipped.find(name)) is not None), None)
        if found is None:
            raise RecordingError("no recordings came with this package: give a folder that holds some.")
        recorded = found
    return recordings(recorded) if isinstance(recorded, str | Path) else list(recorded)


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


def flip(
    engine: Engine, before: str, after: str, seconds: float = 6.0, *, reference: Any = None, **settings: Any
) -> Frame:
    """Run requests for `seconds` in one mode, then as long in another, and return the last moment of it.

    On a slow machine it takes longer: until two requests have ended on either side.

    `frame.before` and `frame.after` hold the figures on either side of the flip; `lab.show(frame)` draws it. The engine
    is left in the mode it was in.
    Arguments are those of `live`. Raises ModeError for a mode that does not run here, and SplitwiserError when the
    run could not be ended.
    """
    for mode in (before, after):
        find_mode(mode, engine.device)
    was, session = engine.mode, Session(engine, None, Settings(**{**settings, "mode": before}), reference)
    try:
        session.start()
        _wait(session, lambda frame: frame.state != "preparing", _PREPARE_SECONDS)
        _wait(session, lambda frame: _lasts(frame.after, seconds), 10 * seconds)
        session.choose(after)
        frame = _wait(session, lambda f: f.before is not None and _lasts(f.after, seconds), 60 + 10 * seconds)
    finally:
        session.close()
    engine.set_mode(was)
    if frame.state == "failed" or frame.before is None:
        raise SplitwiserError(f"the run did not come as far as the flip: {frame.message}")
    return frame


def _lasts(stretch: Stretch | None, seconds: float) -> bool:
    return stretch is not None and stretch.seconds >= seconds and stretch.completed >= _ENOUGH


def _wait(session: Session, over: Callable[[Frame], bool], seconds: float) -> Frame:
    """The first frame that fits, or the last one when the run fails or time is up."""
    deadline = time.monotonic() + seconds
    while not over(frame := session.frame()) and frame.state != "failed" and time.monotonic() < deadline:
        time.sleep(0.1)
    return frame
