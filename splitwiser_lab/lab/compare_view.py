"""All modes on the same work in one call: what each should do to the longest gap, drawn first, and what it did.

The prediction is arithmetic, from this machine's measured kernels (`predict`), and knows no queue: it says what one
prompt does to the answers being written. Where it is far off, something else is at work; that is worth a look.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import MODES, supported_modes
from splitwiser_lab.lab.dashboard.show import choose_drawing
from splitwiser_lab.lab.dashboard.source import Knob
from splitwiser_lab.lab.display import publish, static
from splitwiser_lab.lab.static_bars import bars_svg
from splitwiser_lab.lab.tables import table, table_html
from splitwiser_lab.measure.compare import Comparison
from splitwiser_lab.measure.compare import compare as run_modes
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.predict.kernels import Kernels, measure_kernels
from splitwiser_lab.predict.roofline import predict_seconds
from splitwiser_lab.predict.work import Part, decode, prefill

_TITLE = "Longest gap between two tokens of one answer"
_CHOICES = {  # of the sliders: part of the work -> label, values, unit
    "prompt_tokens": ("prompt", (32, 64, 128, 256, 512, 1024), "tokens"),
    "output_tokens": ("output", (8, 16, 32, 64), "tokens"),
    "rate": ("arrival rate", (0.5, 1, 2, 4, 8), "/s"),
}
_SHARE = 0.5  # of the machine, that each of two lanes has


@dataclass(frozen=True)
class Work:
    """Requests of one length that arrive at random; `rate` in requests per second."""

    prompt_tokens: int = 192
    output_tokens: int = 24
    rate: float = 1.0
    requests: int = 8

    @property
    def workload(self) -> Workload:
        """The same as a workload."""
        how = {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        return Workload.poisson(self.rate, requests=self.requests, **how)  # type: ignore[arg-type]


def compare(
    engine: Engine, modes: Sequence[str] | None = None, *, repeats: int = 2, reference: Any = None, **work: Any
) -> Comparison | None:
    """Draw what each mode should do to the longest gap, run the same requests in all of them, and draw what they did.

    `modes`: None for all that run here. `work`: prompt_tokens, output_tokens, rate, requests. Returns the comparison;
    in JupyterLab and VS Code sliders set the work and a button runs it, so there is nothing to return yet. Raises
    what `measure.compare.compare` raises.
    """
    chosen = list(modes or (m.mode for m in supported_modes(engine.device) if m.available and m.mode != "auto"))
    view = _View(engine, chosen, Work(**work), repeats, reference)
    if choose_drawing().value == "task":
        view.show()
        return None
    publish(static(view.predicted()))
    found = view.measure()
    publish(static(view.measured(found)))
    table(found.rows())
    return found


def expected_gap_ms(engine: Engine, modes: Sequence[str], work: Work) -> dict[str, float]:
    """The longest gap between two tokens that one prompt causes in each mode, from this machine's kernels (ms).

    One lane that prefills whole prompts: a prefill and a decode step. Mixed batches: one of them, with a chunk as
    large as the budget leaves. Two lanes: a decode step on half of the machine. `auto`, which has no lanes of its
    own: the least of these.
    """
    seconds = functools.partial(_seconds, engine)
    context = work.prompt_tokens + work.output_tokens
    step = seconds(decode(context))
    reading = seconds(prefill(work.prompt_tokens))
    batch = max(1, round(work.rate * (reading + work.output_tokens * step)))  # Little's law: under way at once
    steps = decode(context, batch)
    chunk = min(work.prompt_tokens, max(1, engine.limits.chunk_tokens - batch))
    whole, slices = reading + seconds(steps), seconds((*steps, Part(chunk, work.prompt_tokens)))
    apart = seconds(steps) / _SHARE

    def gap(mode: str) -> float:
        if not MODES[mode].lanes:
            return min(whole, slices, apart)
        if len(MODES[mode].lanes) > 1:
            return apart
        return slices if "chunk_tokens" in MODES[mode].options else whole

    return {mode: 1e3 * gap(mode) for mode in modes}


def _seconds(engine: Engine, parts: Sequence[Part]) -> float:
    dtype = str(engine.dtype).removeprefix("torch.")
    return predict_seconds(engine.config, parts, _kernels(engine.config, engine.device, dtype), engine.dtype.itemsize)


@functools.cache
def _kernels(config: Any, device: str, dtype: str) -> Kernels:
    return measure_kernels(config, device, dtype)


class _View:
    """The pictures of one comparison, and the widgets that set its work."""

    def __init__(self, engine: Engine, modes: list[str], work: Work, repeats: int, reference: Any) -> None:
        self._engine, self._modes, self.work = engine, modes, work
        self._repeats, self._reference = repeats, reference

    @property
    def knobs(self) -> list[Knob]:
        """What sets the work, as it stands."""
        return [
            Knob.of(name, label, values, getattr(self.work, name), unit)
            for name, (label, values, unit) in _CHOICES.items()
        ]

    def predicted(self) -> str:
        """The prediction alone."""
        gaps = expected_gap_ms(self._engine, self._modes, self.work)
        return self._bars({f"{mode}, predicted": gap for mode, gap in gaps.items()}, "Predicted; not measured yet.")

    def measure(self) -> Comparison:
        """Run the modes."""
        settings: dict[str, Any] = {"repeats": self._repeats, "overlap": False, "reference": self._reference}
        return run_modes(self._engine, self.work.workload, self._modes, **settings)

    def measured(self, found: Comparison) -> str:
        """Prediction and measurement, mode by mode."""
        gaps, values = expected_gap_ms(self._engine, self._modes, self.work), dict[str, float]()
        for run in found.runs:
            values[f"{run.mode}, predicted"] = gaps[run.mode]
            values[f"{run.mode}, measured"] = run.figures()["max_itl_ms"]
        said = "identical in all modes" if all(run.tokens_identical for run in found.runs) else "NOT identical"
        return self._bars(values, f"Medians of {self._repeats} interleaved repeats; tokens {said}.")

    def show(self) -> None:
        """Sliders, a button, and the picture, which follows the sliders until it is measured."""
        import ipywidgets as widgets
        from IPython.display import display

        from splitwiser_lab.lab.dashboard.controls import roomy, slider

        picture, rows, button = widgets.HTML(self.predicted()), widgets.HTML(), widgets.Button(description="Measure")
        rows.add_class("jp-RenderedHTMLCommon")  # tables look as they do below a cell

        def observed(knob: Knob) -> Any:
            made = slider(knob)
            made.observe(functools.partial(moved, knob.name), "value")
            return made

        def moved(name: str, new: Mapping[str, Any]) -> None:
            self.work = replace(self.work, **{name: new["new"]})
            picture.value, rows.value = self.predicted(), ""

        def pressed(_: Any) -> None:
            button.disabled, button.description = True, "Measuring ..."
            try:
                found = self.measure()
                picture.value, rows.value = self.measured(found), table_html(found.rows())
            except Exception as error:  # a callback's traceback would show nowhere
                rows.value = f"<b>It could not be measured:</b> {error}"
            finally:
                button.disabled, button.description = False, "Measure"

        button.on_click(pressed)
        controls = widgets.HBox(
            [button, *map(observed, self.knobs), roomy()], layout=widgets.Layout(flex_flow="row wrap")
        )
        display(widgets.VBox([controls, picture, rows]))  # type: ignore[no-untyped-call]

    def _bars(self, values: Mapping[str, float], note: str) -> str:
        work = self.work
        title = f"{_TITLE}: {work.prompt_tokens} tokens in, {work.output_tokens} out, {work.rate:g}/s"
        return bars_svg(values, "ms", title, note=note)
