"""How vLLM engines share one device: the mode, the engines, and what each may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from splitwiser_lab.errors import ModeError
from splitwiser_lab.hardware import cores
from splitwiser_lab.lanes.support import why_not

VllmMode = Literal["sequential", "replicas", "split"]
Connector = Literal["example", "shared"]
Part = Literal["both", "prefill", "decode"]


@dataclass(frozen=True)
class EngineRole:
    """One engine: its name, its part of the work, and its percentage of the SMs under MPS (None: no MPS)."""

    name: str
    part: Part
    sm_share: int | None


@dataclass(frozen=True)
class VllmPlacement:
    """A mode with its options.

    sequential  one engine; `chunk_tokens` None leaves prompts whole, a number cuts them into chunks
    replicas    N engines, each with its part of the requests and of the KV budget
    split       one engine prefills, N - 1 decode; vLLM's `connector` hands keys and values over
    """

    mode: VllmMode
    engines: int
    chunk_tokens: int | None
    connector: Connector | None
    mps: bool
    sm_shares: tuple[int, ...]

    @classmethod
    def of(
        cls,
        mode: str,
        engines: int | None = None,
        chunk_tokens: int | None = None,
        connector: str | None = None,
        mps: bool = False,
        sm_shares: Sequence[int] | None = None,
    ) -> VllmPlacement:
        """Check a mode and its options. Raises ModeError for what does not exist or makes no sense."""
        if mode not in get_args(VllmMode):
            raise ModeError(f"the vLLM pipeline has no mode {mode!r}: use {', '.join(get_args(VllmMode))}.")
        count = {"sequential": 1, "replicas": 2, "split": 2}[mode] if engines is None else engines
        if not isinstance(count, int) or count < 1:
            raise ModeError(f"engines={engines!r}: give a whole number of engines, 1 or more.")
        if mode == "sequential" and count != 1:
            raise ModeError(f"sequential is one engine, not {count}: use mode 'replicas' or 'split'.")
        if mode == "split" and count < 2:
            raise ModeError(f"split needs 2 engines or more, one for prefill, not {count}.")
        if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 16 or mode == "split"):
            why = "a prompt is handed over whole" if mode == "split" else "give 16 tokens or more, or none"
            raise ModeError(f"chunk_tokens={chunk_tokens!r} in mode {mode}: {why}.")
        if connector is not None and (mode != "split" or connector not in get_args(Connector)):
            raise ModeError(
                f"connector={connector!r} in mode {mode}: only 'split' hands anything over, by "
                f"{' or '.join(get_args(Connector))}."
            )
        shares = tuple(sm_shares or (100,) * count)
        if sm_shares and not mps:
            raise ModeError("sm_shares are shares under MPS: add mps=True.")
        if len(shares) != count or not all(isinstance(share, int) and 1 <= share <= 100 for share in shares):
            raise ModeError(f"sm_shares={list(shares)}: give {count} percentages of the SMs, from 1 to 100.")
        chosen = (connector or "shared") if mode == "split" else None
        return cls(mode, count, chunk_tokens, chosen, mps, shares)  # type: ignore[arg-type]

    def check(self, device: str) -> None:
        """Raise ModeError where this cannot run on `device`, with the reason."""
        if self.mps and (reason := why_not("mps", device)):
            raise ModeError(f"mps=True cannot run on {device}: {reason}.")

    @property
    def processes(self) -> int:
        """One for each engine."""
        return self.engines

    @property
    def roles(self) -> list[EngineRole]:
        """The engines, prefill first."""
        names: list[tuple[str, Part]] = [(f"engine {number}", "both") for number in range(self.engines)]
        if self.mode == "split":
            decode = ["decode"] if self.engines == 2 else [f"decode {number}" for number in range(self.engines - 1)]
            names = [("prefill", "prefill"), *((name, "decode") for name in decode)]
        shares = self.sm_shares if self.mps else (None,) * self.engines
        return [EngineRole(name, part, share) for (name, part), share in zip(names, shares, strict=True)]

    def cores(self) -> list[list[int]]:
        """The CPU cores of each engine: equal shares; where there are more engines than cores, they take turns."""
        available = cores()
        if self.engines >= len(available):
            return [[available[number % len(available)]] for number in range(self.engines)]
        ends = [round(len(available) * number / self.engines) for number in range(self.engines + 1)]
        return [available[start:end] for start, end in pairwise(ends)]

    def __str__(self) -> str:
        count = "" if self.mode == "sequential" else f" × {self.engines}"
        chunk = f", chunks of {self.chunk_tokens}" if self.chunk_tokens else ""
        how = f", {self.connector}" if self.connector else ""
        shares = f" {'/'.join(map(str, self.sm_shares))} %" if any(share != 100 for share in self.sm_shares) else ""
        return f"{self.mode}{count}{chunk}{how}{f', MPS{shares}' if self.mps else ''}"
