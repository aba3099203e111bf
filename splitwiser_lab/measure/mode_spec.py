"""A mode with its options, written as one word: `chunked`, `chunked:chunk_tokens=256`, `mps:a=1:b=2`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import find_mode
from splitwiser_lab.errors import ModeError


@dataclass(frozen=True)
class ModeSpec:
    """What `engine.set_mode` takes: a mode's name and its options."""

    mode: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> ModeSpec:
        """Read `mode:option=value:...`; values are numbers. Raises ModeError when it cannot be read."""
        mode, *pairs = text.strip().split(":")
        options: dict[str, Any] = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            try:
                options[name] = float(value) if "." in value else int(value)
            except ValueError:
                raise ModeError(
                    f"mode {text!r}: write an option as name=number, as in chunked:chunk_tokens=256."
                ) from None
        return cls(mode, options)

    def __str__(self) -> str:
        return ":".join([self.mode, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def label(self) -> str:
        """As people read it, e.g. `partitioned (decode_sms=64)`."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.mode} ({options})" if options else self.mode

    def check(self, device: str) -> None:
        """Raise ModeError when the mode does not run on `device` here or has no such option."""
        find_mode(self.mode, device).check(self.options, device)

    def set(self, engine: Engine) -> None:
        """Make it the mode of `engine`."""
        engine.set_mode(self.mode, **self.options)
