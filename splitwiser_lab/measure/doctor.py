"""What this machine can do: hardware, choices made for it and why, every mode and why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from splitwiser_lab.engine.modes import supported_modes
from splitwiser_lab.errors import ModeError
from splitwiser_lab.hardware import Choice, Hardware, ModeSupport, choose_device, choose_dtype, describe
from splitwiser_lab.lanes.share_check import ShareCheck, check_shares
from splitwiser_lab.lanes.support import daemon_of, index_of, why_not
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
    mps_shares: list[ShareCheck] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "hardware": self.hardware.to_dict(),
            "choices": {name: choice._asdict() for name, choice in self._choices().items()},
            "modes": [mode._asdict() for mode in self.modes],
            "models": self.models,
            "versions": self.versions,
            "mps_shares": [asdict(share) for share in self.mps_shares],
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
        tables = [machine, choices, modes, models]
        if self.mps_shares:
            shares = Table("% of the SMs", "SMs", "multiplies", title="shares under MPS", title_justify="left")
            for share in self.mps_shares:
                shares.add_row(str(share.percent), str(share.sms or "–"), str(share))
            tables.append(shares)
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(*tables)
        return capture.get().rstrip()

    __repr__ = __str__


def doctor(device: str = "auto", mps_shares: Sequence[int] = ()) -> Diagnosis:
    """Look at this machine, and try these percentages of the SMs under MPS, which takes some seconds each.

    Raises HardwareError for a `device` that is not there, ModeError where there are shares to try but no MPS.
    """
    where = choose_device(device)
    shares = list(_try_shares(where.value, mps_shares)) if mps_shares else []
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
        mps_shares=shares,
    )


def _try_shares(device: str, percents: Sequence[int]) -> Iterator[ShareCheck]:
    """Each share of the GPU's SMs, by a client of a daemon of our own."""
    wrong = [percent for percent in percents if not 1 <= percent <= 100]
    if wrong:
        raise ModeError(f"shares of {wrong} %: give percentages of the SMs, from 1 to 100.")
    if reason := why_not("mps", device):
        raise ModeError(f"shares under MPS cannot be tried on {device}: {reason}.")
    return check_shares(daemon_of(index_of(torch.device(device))), percents)


def _model_state(alias: str) -> str:
    folder = cache_dir() / "models" / alias
    if (folder / "complete").is_file():
        return f"ready, from {(folder / 'complete').read_text(encoding='utf-8').strip()}"
    package = ALIASES[alias].package
    ways = f"Hub {ALIASES[alias].hub_id}" + (f", or package {package.requirement}" if package else "")
    return f"fetched at first use: {ways}"
