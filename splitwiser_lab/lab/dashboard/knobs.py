"""What can be set in the live lab: the work that comes, and the options of the modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitwiser_lab.engine.modes import MODES, Mode
from splitwiser_lab.lab.dashboard.frame import Line
from splitwiser_lab.lab.dashboard.shares import share_knob
from splitwiser_lab.lab.dashboard.source import Knob
from splitwiser_lab.measure.sources import Metric

CHUNK, BATCH, RATE, PROMPT, OUTPUT = (
    "chunk_tokens",
    "max_batch",
    "rate",
    "prompt_tokens",
    "output_tokens",
)
_RATES = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700)
_CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_NEW = (4, 8, 16, 32, 64, 128, 256)
_SHOWN_LINES = 4
_PREFERRED = ("sm", "tensor", "dram", "occupancy", "gpu")  # of a GPU; the first of them that it has


@dataclass(frozen=True)
class Settings:
    """How a live run begins. `rate` in requests per second; None chooses one that keeps this machine busy.

    `options` are those of the modes (chunk_tokens, ...): each mode takes the ones that it knows.
    """

    mode: str = "sequential"
    options: Mapping[str, int] = field(default_factory=dict)
    rate: float | None = None
    prompt_tokens: int = 128
    output_tokens: int = 32

    def options_of(self, mode: Mode) -> dict[str, int]:
        """The options that this mode takes."""
        return {name: value for name, value in self.options.items() if name in mode.known_options}


def knobs_of(settings: Settings, engine: Any, given: bool) -> list[Knob]:
    """The controls as they stand; `given`: the requests are those of a workload, whose lengths are its own."""
    fixed = "the workload's own" if given else ""
    room = engine.longest_request
    lengths = [n for n in _LENGTHS if n + settings.output_tokens <= room]
    new = [n for n in _NEW if n + settings.prompt_tokens <= room]
    return [
        *_option_knobs(settings, engine),
        Knob.of(RATE, "arrival rate", _RATES, settings.rate or 1.0, "/s", "" if settings.rate else "being chosen"),
        Knob.of(PROMPT, "prompt", lengths, settings.prompt_tokens, "tokens", fixed),
        Knob.of(OUTPUT, "output", new, settings.output_tokens, "tokens", fixed),
    ]


def rounded_rate(rate: float) -> float:
    """The highest of the rates to choose from that is not above this one."""
    return max((r for r in _RATES if r <= rate), default=_RATES[0])


def hardware_lines(metrics: Sequence[Metric]) -> list[Line]:
    """What is plotted of these metrics: at most four, in per cent; each core where they are few, else their mean."""
    there = {m.key: m for m in metrics if not m.reason and m.unit.startswith("%")}
    gpu = [key for key in _PREFERRED if key in there]
    each = [key for key in there if key.startswith("core_")]
    chosen = gpu or (each if len(each) <= _SHOWN_LINES else ["cpu", "process"])
    return [Line(key, there[key].label) for key in chosen[:_SHOWN_LINES] if key in there]


def _option_knobs(settings: Settings, engine: Any) -> list[Knob]:
    mode, limits, options = settings.mode, engine.limits, settings.options
    whole = "does not cut prompts into chunks" if MODES[mode].lanes else "chooses it by itself"
    chunk = "" if CHUNK in MODES[mode].known_options else f"{mode} {whole}"
    return [
        share_knob(mode, engine.device, options),
        Knob.of(CHUNK, "chunk", _CHUNKS, options.get(CHUNK, limits.chunk_tokens), "tokens", chunk),
        Knob.of(BATCH, "batch limit", _BATCHES, options.get(BATCH, limits.max_requests), "requests"),
    ]
