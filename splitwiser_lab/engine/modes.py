"""The modes: which lanes there are, and which policy feeds each. Nothing else tells modes apart.

To add a mode, add an entry to `MODES`; if it needs a new kind of lane, teach `lanes.factory` to build it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from splitwiser_lab.engine.scheduler import Policy, decode_only, mixed, prefill_first, prefill_only
from splitwiser_lab.errors import ModeError
from splitwiser_lab.hardware import ModeSupport, choose_device
from splitwiser_lab.lanes.support import LaneKind, check_options, why_not

_COMMON = {"max_batch": "requests in the pool at once", "prefill_tokens": "tokens in one prefill batch"}


@dataclass(frozen=True)
class Mode:
    """`lanes` maps the name of each lane to its kind and to the policy that feeds it."""

    name: str
    summary: str
    lanes: dict[str, tuple[LaneKind, Policy]]
    options: dict[str, str] = field(default_factory=dict)

    @property
    def known_options(self) -> dict[str, str]:
        """The options that this mode takes, with what each of them means."""
        return {**_COMMON, **self.options}

    def check(self, options: dict[str, Any], device: str) -> None:
        """Raise ModeError unless all options are known here, are positive whole numbers, and suit `device`."""
        known = self.known_options
        for name, value in options.items():
            if name not in known:
                listed = "; ".join(f"{option}: {meaning}" for option, meaning in known.items())
                raise ModeError(f"mode {self.name!r} has no option {name!r}. It has {listed}.")
            if not isinstance(value, int) or value < 1:
                raise ModeError(f"{name}={value!r} ({known[name]}): give a whole number of at least 1.")
        check_options({name: kind for name, (kind, _) in self.lanes.items()}, device, options)


# Decode first, for lanes are fed in this order: its step is launched at once, a long prefill kernel by kernel.
_SPLIT: dict[str, Policy] = {"decode": decode_only, "prefill": prefill_only}


def _split(kind: LaneKind) -> dict[str, tuple[LaneKind, Policy]]:
    return {lane: (kind, policy) for lane, policy in _SPLIT.items()}


MODES = {
    mode.name: mode
    for mode in (
        Mode("sequential", "one lane, phases in turns, prefill first", {"main": ("inline", prefill_first)}),
        Mode(
            "chunked",
            "one lane, mixed batches: all decode tokens, then chunks of prompts",
            {"main": ("inline", mixed)},
            {"chunk_tokens": "tokens in one mixed batch"},
        ),
        Mode(
            "processes",
            "two processes over the same weights and pool: on a CPU each has its cores, on a GPU they take turns",
            _split("process"),
            {"decode_cores": "cores of the decode lane on a CPU; prefill gets the rest"},
        ),
        Mode("streams", "two CUDA streams, decode at high priority", _split("stream")),
        Mode(
            "partitioned",
            "two green contexts with disjoint SMs",
            _split("partition"),
            {"decode_sms": "SMs of the decode lane; prefill gets the rest"},
        ),
        Mode(
            "mps",
            "two processes under NVIDIA MPS, each with its share of the SMs",
            _split("mps"),
            {"prefill_share": "percent of the SMs for prefill", "decode_share": "percent of the SMs for decode"},
        ),
        Mode(
            "auto",
            "whichever of the others pays for the work at hand, by measured rates",
            {},  # no lanes of its own: it borrows those of the mode it chooses
            {
                "itl_limit_ms": "the longest gap between two tokens that may be planned for, in milliseconds",
                "with_processes": "1 to have lanes in other processes among the choices on a GPU",
            },
        ),
    )
}


def supported_modes(device: str = "auto") -> list[ModeSupport]:
    """Each mode with whether it runs on `device` here, and why or why not."""
    where = choose_device(device).value
    return [_support(mode, where) for mode in MODES.values()]


def _support(mode: Mode, device: str) -> ModeSupport:
    reasons = [reason for kind, _ in mode.lanes.values() if (reason := why_not(kind, device))]
    return ModeSupport(mode.name, not reasons, reasons[0] if reasons else mode.summary)


def find_mode(name: str, device: str) -> Mode:
    """The mode of that name. Raises ModeError when there is none, or when it cannot run here, with the reason."""
    if name not in MODES:
        raise ModeError(f"unknown mode {name!r}: choose one of {', '.join(MODES)}.")
    support = _support(MODES[name], device)  # of this one alone: to try them all takes seconds on a GPU
    if not support.available:
        runs = ", ".join(mode.mode for mode in supported_modes(device) if mode.available)
        raise ModeError(f"mode {name!r} cannot run on {device} here: {support.reason}. These can: {runs}.")
    return MODES[name]
