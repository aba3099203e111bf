"""A section's view of the suite: what to measure, how long there is, and where the rows go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from splitwiser_lab.engine.choices import splits
from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import supported_modes
from splitwiser_lab.measure.gpu_suite.plan import ChatLimits, Plan, SectionName

Row = dict[str, Any]


@dataclass
class Job:
    """One section on one shape. `rows` and `left_out` are the suite's own lists: what is added is written at once."""

    section: SectionName
    model: str  # as Engine.from_pretrained takes it
    shape: str  # as the results call it
    plan: Plan
    limits: ChatLimits
    repeats: int
    deadline: float  # on time.monotonic's clock
    report: Callable[[str], None]
    written: Callable[[], None]
    device: str
    dtype: str
    vllm: str | None = None
    record: Path | None = None
    modes: Sequence[str] = ()  # of the sweep; empty: all that run here
    capacity: float | None = None  # requests/s of the sweep's 100 %; None: measured
    loads: int = 0  # of the gain map, from the first; 0: all
    origin: dict[str, Any] = field(default_factory=dict)
    ceilings: Any = None
    engine_or_none: Engine | None = None
    rows: list[Row] = field(default_factory=list)
    left_out: list[Row] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        """The engine over this shape."""
        assert self.engine_or_none is not None, f"section {self.section} was given no engine"
        return self.engine_or_none

    @property
    def seconds_left(self) -> float:
        """Until this section must end."""
        return self.deadline - time.monotonic()

    def add(self, **row: Any) -> None:
        """A row of figures; equal names are drawn in one column."""
        self.rows.append(row)
        self.written()

    def skip(self, what: str, why: object) -> None:
        """Something that is not measured, and why."""
        self.left_out.append({"what": what, "why": str(why)})
        self.report(f"{self.shape}, {self.section}: {what} left out: {why}")
        self.written()

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether `seconds` more are left; if not, that is noted."""
        if self.seconds_left >= seconds:
            return True
        self.skip(
            what, f"no time: {max(self.seconds_left, 0):.0f} s are left of this section, it needs {seconds:.0f} s"
        )
        return False

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Whatever goes wrong inside costs `what` and nothing else; it is noted with its error."""
        try:
            yield
        except Exception as error:  # kernels, drivers and libraries raise anything
            self.skip(what, f"{type(error).__name__}: {str(error).strip()[:400] or 'no message'}")


def split_modes(
    engine: Engine, fractions: tuple[float, ...], chunks: tuple[int, ...] = ()
) -> tuple[list[str], dict[str, str]]:
    """Every mode of this machine as text, and those that it lacks, with reasons.

    `partitioned` once for each split, `chunked` as it comes and once for each of `chunks` (tokens of a batch).
    """
    modes, missing = [], {}
    for support in supported_modes(engine.device):
        if not support.available:
            missing[support.mode] = support.reason
        elif support.mode == "partitioned":
            modes += [f"partitioned:decode_sms={sms}" for sms, _ in splits(engine.device, fractions)]
        else:
            modes.append(support.mode)
            modes += [f"chunked:chunk_tokens={tokens}" for tokens in chunks if support.mode == "chunked"]
    return modes, missing


def summary(values: list[float]) -> Row:
    """Median, lowest, highest and all samples of one figure."""
    return {"median": median(values), "low": min(values), "high": max(values), "samples": values}


def over(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Ratios of what was measured in the same round; a round that one of both lacks has none."""
    return [rate / theirs[number] for number, rate in ours.items() if number in theirs]
