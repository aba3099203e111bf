"""The work of a reproduction, and one row for each way to do it: plain data, written to JSON and read back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from splitwiser_lab.measure.reference import TokenCheck

BASE = "sequential"  # the row that the others are compared with
_SHOWN = 20  # differences that are described, besides those that precision does not explain


def name_of_work(name: str, output: int, rate: float | None = None) -> str:
    """`split × 2, 12 new tokens, 151 requests/s`: one way, with one length and one way of arriving."""
    return f"{name}, {output} new tokens" + ("" if rate is None else f", {rate:.3g} requests/s")


@dataclass(frozen=True)
class LeftOut:
    """What was asked for in `rounds` rounds and not measured in all of them: `what`, as `Row.what` says it, and why."""

    what: str
    why: str
    rounds: int


@dataclass(frozen=True)
class Work:
    """The work that every row did: `requests` prompts of `input_tokens` random tokens, in batches of `batch`.

    `eager` and `max_batch` are what vLLM's engines were told: see `vllm/settings.py`.
    """

    model: str
    random_weights: bool
    dtype: str
    batch: int
    input_tokens: int
    requests: int
    seed: int
    eager: bool = False
    max_batch: int | None = None

    @property
    def regime(self) -> str:
        """What was asked of every engine; empty for how they run by themselves."""
        batch = f"{self.max_batch} at once per engine" if self.max_batch else ""
        return ", ".join(word for word in ("eager" if self.eager else "", batch) if word)

    @property
    def batches(self) -> int:
        """How many batches that makes."""
        return -(-self.requests // self.batch)

    def __str__(self) -> str:
        weights = "random weights of its shape" if self.random_weights else "real weights"
        return (
            f"{self.model} ({weights}, {self.dtype}): {self.requests} requests of {self.input_tokens} tokens, "
            + (f"batches of {self.batch}" if self.batch < self.requests else "all at once")
            + (f"; {self.regime}" if self.regime else "")
        )


@dataclass
class Row:
    """One way to do the work: its figures in every round, and what its tokens were.

    `mode` is that of the pipeline; `generate` or `engine` for what runs beside it. `rate`: requests came one by one,
    so many a second (None: all at once). `different` counts, over the rounds, requests whose tokens are not
    the reference's; `differences` says of the first of them, and of all `unexplained` ones, which precision does not
    explain, where they differ and how far.
    """

    name: str
    output: int
    mode: str = ""
    processes: int = 1
    mps: bool = False
    rate: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    different: int = 0
    differences: list[str] = field(default_factory=list)
    unexplained: int = 0

    @property
    def what(self) -> str:
        """What was measured, in words: see `name_of_work`."""
        return name_of_work(self.name, self.output, self.rate)

    @property
    def tokens_identical(self) -> bool:
        """Every token of every request in every round is the reference's."""
        return not self.different

    @property
    def repeats(self) -> int:
        """Rounds that were measured."""
        return len(self.samples.get("output_throughput", []))

    def add(self, figures: dict[str, Any]) -> None:
        """Take the figures of one round, leaving out what was not measured."""
        for name, value in figures.items():
            if value is not None:
                self.samples.setdefault(name, []).append(float(value))

    def judge(self, checks: Iterable[TokenCheck]) -> None:
        """Take what a round's tokens were found to be, one check a request."""
        for check in checks:
            if check.identical:
                continue
            self.different += 1
            self.unexplained += not check.explained
            if len(self.differences) < _SHOWN or not check.explained:
                self.differences.append(str(check))

    def figure(self, name: str) -> float | None:
        """The median of a figure over the rounds; None where it was not measured."""
        values = self.samples.get(name)
        return median(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """Medians over the rounds, minimum and maximum in `spread`, and every round in `samples`."""
        return {
            **{"name": self.name, "output_tokens": self.output},
            **{"mode": self.mode, "processes": self.processes, "mps": self.mps, "rate": self.rate},
            **{name: median(values) for name, values in self.samples.items()},
            "tokens_identical": self.tokens_identical,
            "different": self.different,
            "differences": self.differences,
            "unexplained": self.unexplained,
            "repeats": self.repeats,
            "spread": {name: [min(values), max(values)] for name, values in self.samples.items()},
            "samples": self.samples,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Row:
        """Read back what `to_dict` gave."""
        kept = {name: raw[name] for name in ("name", "mode", "processes", "mps", "differences", "unexplained")}
        different = raw.get("different", len(raw["differences"]))
        return cls(
            output=raw["output_tokens"], samples=raw["samples"], rate=raw.get("rate"), different=different, **kept
        )
