"""Two views of both phases, each with the prediction drawn before anything is measured.

`profile` shows tokens per second over the tokens in one step, `roofline` where each shape lies under the roofs of
this machine and of others. Where plotly figures live, the roofline has sliders.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitwiser_lab.lab.chart import Chart, Series, chart_figure, chart_svg, si, trace
from splitwiser_lab.lab.display import Redrawn
from splitwiser_lab.lab.palette import INK, OTHER_COLOUR, PHASE_COLOURS
from splitwiser_lab.lab.report import number
from splitwiser_lab.measure.profile import PhaseProfile, PhaseTiming, profile_phases
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.predict.ceilings import DATASHEETS, Ceilings
from splitwiser_lab.predict.kernels import Kernels, measure_kernels
from splitwiser_lab.predict.roofline import bound, predict_seconds
from splitwiser_lab.predict.work import Work, decode, prefill, work
from splitwiser_lab.timeline import Phase

if TYPE_CHECKING:
    from splitwiser_lab.engine.engine import Engine

_PHASES: dict[str, str] = {phase: PHASE_COLOURS[phase] for phase in ("prefill", "decode")}
_SLIDER_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SLIDER_PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def profile(
    engine: Engine,
    prompt_tokens: Sequence[int] = (64, 256, 512),
    batches: Sequence[int] = (1, 8),
    *,
    new_tokens: int = 9,
    repeats: int = 3,
) -> PhaseProfile:
    """Draw the predicted speed of both phases at these shapes, measure them, and draw what came out beside it.

    Returns the profile: `lab.table(found.rows())` shows its figures, `lab.roofline(engine, found)` its place under
    the roofs. Raises RequestError as `measure.profile.profile_phases`.
    """
    kernels = _kernels(engine.config, engine.device, str(engine.dtype).removeprefix("torch."))
    later = new_tokens // 2  # decode is timed in the middle of its steps
    shapes: list[tuple[Phase, int, int]] = [("prefill", t, b) for b in batches for t in prompt_tokens]
    shapes += [("decode", t + later, b) for b in batches for t in prompt_tokens]
    names, picture = (engine.model.name, kernels.ceilings.name), Redrawn()
    guesses = _guess(engine.config, kernels, engine.dtype.itemsize, shapes)
    picture.show(chart_svg(_speed_chart(guesses, (), *names)))
    settings: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "kernels": kernels}
    found = profile_phases(engine, prompt_tokens, batches, **settings)
    chart = _speed_chart(_guessed(found), found.timings, *names)
    picture.show(chart_svg(chart), lambda: chart_figure(chart))
    return found


def roofline(
    engine: Engine,
    found: PhaseProfile | None = None,
    prompt_tokens: Sequence[int] = (64, 512),
    batches: Sequence[int] = (1, 8),
) -> None:
    """Draw both phases under the roofs of this machine, those of data sheets beside them.

    Hollow marks are predictions: for the shapes of `found`, a profile, where one is given, with what was measured as
    filled marks; else for these prompt lengths and batch sizes. In a live front end two sliders move a prediction.
    """
    dtype, size = str(engine.dtype).removeprefix("torch."), engine.dtype.itemsize
    kernels = found.kernels if found else _kernels(engine.config, engine.device, dtype)
    shapes: list[tuple[Phase, int, int]] = [("prefill", t, 1) for t in prompt_tokens]
    shapes += [("decode", max(prompt_tokens), b) for b in batches]
    guesses = _guessed(found) if found else _guess(engine.config, kernels, size, shapes)
    chart = _roof_chart(kernels.ceilings, guesses, found.timings if found else (), engine.model.name)
    Redrawn().show(chart_svg(chart), lambda: _with_sliders(chart, engine.config, kernels, size))


@functools.cache
def _kernels(config: ModelConfig, device: str, dtype: str) -> Kernels:
    return measure_kernels(config, device, dtype)


@dataclass(frozen=True, slots=True)
class _Guess:
    """One shape with the work it is and the seconds predicted for it."""

    phase: Phase
    tokens: int
    batch: int
    work: Work
    seconds: float

    @property
    def shape(self) -> str:
        return _shape(self.phase, self.tokens, self.batch)


def _guess(
    config: ModelConfig, kernels: Kernels, itemsize: int, shapes: Iterable[tuple[Phase, int, int]]
) -> list[_Guess]:
    found = []
    for phase, tokens, batch in shapes:
        parts = prefill(tokens, batch) if phase == "prefill" else decode(tokens, batch)
        seconds = predict_seconds(config, parts, kernels, itemsize)
        found.append(_Guess(phase, tokens, batch, work(config, parts, itemsize), seconds))
    return found


def _guessed(found: PhaseProfile) -> list[_Guess]:
    return [_Guess(t.phase, t.tokens, t.batch, t.work, t.predicted_s) for t in found.timings]


def _speed_chart(guesses: Sequence[_Guess], timings: Sequence[PhaseTiming], model: str, machine: str) -> Chart:
    """Tokens per second of each phase over the tokens in one step."""
    series, said = [], []
    for phase, colour in _PHASES.items():
        measured = [t for t in timings if t.phase == phase]
        if measured:
            points = tuple((t.tokens_per_s * t.seconds, t.tokens_per_s) for t in measured)
            notes = tuple(f"{_shape(phase, t.tokens, t.batch)}: {_rate(t.tokens_per_s, t.seconds)}" for t in measured)
            series.append(Series(f"{phase}, measured", colour, points, "none", "filled", notes))
            rates = sorted(t.tokens_per_s for t in measured)
            said.append(f"{phase} {rates[0]:,.0f} to {rates[-1]:,.0f} tok/s measured")
        own = [guess for guess in guesses if guess.phase == phase]
        sizes = [guess.batch * (guess.tokens if phase == "prefill" else 1) for guess in own]
        points = tuple((size, size / guess.seconds) for size, guess in zip(sizes, own, strict=True))
        notes = tuple(f"{g.shape}: predicted {_rate(y, g.seconds)}" for g, (_, y) in zip(own, points, strict=True))
        series.append(Series(f"{phase}, predicted", colour, points, "none", "hollow", notes))
    title = f"Speed of both phases: {model} on {machine}"
    return Chart(title, "tokens in one step", "tokens per second", tuple(series), "; ".join(said) or "predictions only")


def _roof_chart(here: Ceilings, guesses: Sequence[_Guess], timings: Sequence[PhaseTiming], model: str) -> Chart:
    """FLOP/s over arithmetic intensity, under the roofs of this machine and of data sheets."""
    ends, series = (0.25, 4000.0), []
    for label, sheet in _sheets(here.dtype):
        series.append(Series("", INK, _roofs(sheet, *ends), "dash", label=label, faint=True))
    roofs = f"{si(here.flops_per_s)}FLOP/s, {si(here.bytes_per_s)}B/s"
    series.append(Series(f"this machine: {roofs}", OTHER_COLOUR, _roofs(here, *ends)))
    for phase, colour in _PHASES.items():
        measured = [t for t in timings if t.phase == phase]
        if measured:
            points = tuple((t.work.intensity, t.flops_per_s) for t in measured)
            notes = tuple(f"{_shape(phase, t.tokens, t.batch)}: {_both(t.work, t.seconds)}" for t in measured)
            series.append(Series(f"{phase}, measured", colour, points, "none", "filled", notes))
        own = [guess for guess in guesses if guess.phase == phase]
        points = tuple((guess.work.intensity, guess.work.flops / guess.seconds) for guess in own)
        notes = tuple(f"{g.shape}: predicted {_both(g.work, g.seconds)}, bound by {bound(g.work, here)}" for g in own)
        series.append(Series(f"{phase}, predicted", colour, points, "none", "hollow", notes))
    described = f"This machine has {roofs}; both roofs meet at {here.ridge:.1f} FLOP/byte"
    title = f"Roofline, {here.dtype}: {model} on {here.name}"
    return Chart(title, "arithmetic intensity (FLOP/byte)", "FLOP/s", tuple(series), described)


def _roofs(ceilings: Ceilings, low: float, high: float) -> tuple[tuple[float, float], ...]:
    """Both roofs of a machine between two intensities."""
    return tuple((x, min(x * ceilings.bytes_per_s, ceilings.flops_per_s)) for x in (low, ceilings.ridge, high))


def _rate(tokens_per_s: float, seconds: float) -> str:
    return f"{tokens_per_s:,.0f} tok/s, {number(seconds * 1e3)} ms a step"


def _both(work: Work, seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms, {si(work.flops / seconds)}FLOP/s, {si(work.bytes / seconds)}B/s"


def _sheets(dtype: str) -> list[tuple[str, Ceilings]]:
    """Data sheets of this dtype (half precision is one), labels of roofs that lie close together joined in the last."""
    half = dtype != "float32"
    sheets = sorted((s for s in DATASHEETS.values() if (s.dtype != "float32") == half), key=lambda s: s.flops_per_s)
    labelled, names = [], list[str]()
    for place, sheet in enumerate(sheets):
        names.append(sheet.name.split()[0])
        later = sheets[place + 1] if place + 1 < len(sheets) else None
        joined = later is not None and later.flops_per_s < 1.3 * sheet.flops_per_s
        labelled.append(("" if joined else ", ".join(names), sheet))
        names = names if joined else []
    return labelled


def _with_sliders(chart: Chart, config: ModelConfig, kernels: Kernels, itemsize: int) -> Any:
    """The chart by plotly, with one mark of each phase that a slider moves: prompt length, and decode's batch."""
    figure, sliders = chart_figure(chart), []
    prompts = [("prefill", tokens, 1) for tokens in _SLIDER_PROMPTS if tokens <= config.context]
    batches = [("decode", min(512, config.context), batch) for batch in _SLIDER_BATCHES]
    for column, (title, shapes) in enumerate((("prompt tokens: ", prompts), ("sequences that decode: ", batches))):
        steps, start = [], len(shapes) // 2
        for guess in _guess(config, kernels, itemsize, shapes):  # type: ignore[arg-type]
            where: dict[str, Any] = {"x": [[guess.work.intensity]], "y": [[guess.work.flops / guess.seconds]]}
            where["text"] = [[f"{guess.shape}: {number(guess.seconds * 1e3)} ms"]]
            label = str(guess.tokens if guess.phase == "prefill" else guess.batch)
            steps.append({"method": "restyle", "label": label, "args": [where, [len(figure.data)]]})
        first: Any = steps[start]["args"]
        phase = shapes[start][0]
        mark = trace(Series(f"{phase}, by slider", _PHASES[phase], ((1.0, 1.0),), "none", "hollow"))
        mark.update({key: values[0] for key, values in first[0].items()})
        mark.update(mode="markers+text", textposition="bottom right", marker_symbol="diamond-open", marker_size=15)
        figure.add_trace(mark)
        place = {"x": 0.54 * column, "len": 0.44, "y": -0.14, "active": start}
        sliders.append({"steps": steps, "currentvalue": {"prefix": title}, **place})
    figure.update_layout(sliders=sliders, height=720, margin_b=270)
    return figure


def _shape(phase: str, tokens: int, batch: int) -> str:
    return f"{phase} {batch} × {tokens:,} tokens" if phase == "prefill" else f"{phase} {batch} at context {tokens:,}"
