"""The errors of the package. Each message says what happened, why, and what to do."""

from __future__ import annotations

from typing import Any


class SplitwiserError(Exception):
    """Base class of every error that this package raises on purpose."""


class RequestError(SplitwiserError, ValueError):
    """A request that cannot be served: empty, too long, or with impossible parameters."""


class ModeError(SplitwiserError, ValueError):
    """A mode that does not exist, or that this machine cannot run."""


class ModelError(SplitwiserError, ValueError):
    """A model that cannot be found, read or understood."""


class HardwareError(SplitwiserError, ValueError):
    """A device or dtype that does not exist here, or memory that does not suffice."""


class WorkloadError(SplitwiserError, ValueError):
    """A workload or trace file that cannot be read or makes no sense."""


class RecordingError(SplitwiserError, ValueError):
    """A recorded run that cannot be read, is damaged, or is of a format that this version does not know."""


class LaneError(SplitwiserError, RuntimeError):
    """A lane failed: its process died, or a batch raised an exception in it."""


class GenerationError(SplitwiserError, RuntimeError):
    """Some requests of a call failed while others finished; `result` holds what was finished."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


def not_a_number(lane: str, number: int) -> LaneError:
    """Of a request whose output token `number` could not be picked."""
    return LaneError(
        f"lane {lane!r}: the logits for output token {number} of a request hold a NaN, so that none is the largest: "
        "the numbers overflowed, or the device computed wrongly. Try dtype='float32', or another mode."
    )
