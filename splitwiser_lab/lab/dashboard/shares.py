"""How a mode shares the machine out between the phases, as one control: cores, SMs, or per cent of the SMs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from splitwiser_lab.engine.modes import MODES
from splitwiser_lab.hardware import cores
from splitwiser_lab.lab.dashboard.source import Knob
from splitwiser_lab.lanes.mps import DEFAULT_SHARES
from splitwiser_lab.lanes.partition import grid_of
from splitwiser_lab.lanes.support import index_of, no_partition

SHARE = "share"  # the control's name
_LABELS = {  # of each option that shares a machine out: what decode's share is called, and its unit
    "decode_cores": ("cores for decode", ""),
    "decode_sms": ("SMs for decode", "SMs"),
    "decode_share": ("SMs for decode", "%"),
}
_PER_CENT = range(5, 101, 5)


def share_option(mode: str, device: str) -> str | None:
    """The option by which this mode shares `device` out between the phases; None where it does not."""
    on_gpu = device.startswith("cuda")
    fitting = (name for name in _LABELS if (name != "decode_cores") == on_gpu)
    return next((name for name in fitting if name in MODES[mode].known_options), None)


def share_knob(mode: str, device: str, options: Mapping[str, int]) -> Knob:
    """The control for decode's share of `device` in this mode; grey where mode or machine leave no choice.

    It offers what the lanes accept, and stands at what they take when nobody chooses.
    """
    option = share_option(mode, device)
    shown = option or _usual_option(device)
    values, usual = _values(shown, device)
    why_not = "this machine can be divided in one way only" if len(values) == 1 else ""
    if option is None:
        why_not = "shares nothing out: both phases run on all of it" if MODES[mode].lanes else "chooses it by itself"
        why_not = f"{mode} {why_not}"
    label, unit = _LABELS[shown]
    return Knob.of(SHARE, label, values, options.get(option, usual) if option else usual, unit, why_not)


def _usual_option(device: str) -> str:
    """For a mode that shares nothing out: the option that other modes have on this device."""
    if not device.startswith("cuda"):
        return "decode_cores"
    return "decode_share" if no_partition(index_of(torch.device(device))) else "decode_sms"


def _values(option: str, device: str) -> tuple[Sequence[int], int]:
    """What decode can have, and what it has if nobody chooses."""
    if option == "decode_cores":
        count = len(cores())
        return range(1, max(2, count)), max(1, count // 2)
    if option == "decode_share":
        return _PER_CENT, DEFAULT_SHARES["decode"]
    grid = grid_of(index_of(torch.device(device)))
    return grid.allowed, grid.decode_sms()
