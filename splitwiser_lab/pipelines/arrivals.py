"""When the requests of an experiment come: all at once, or one by one at a rate (open loop)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.rows import BASE


@dataclass(frozen=True)
class Rate:
    """Poisson arrivals: `value` requests a second, or, `of_served`, times what `sequential` served a second.

    The latter is measured in the run's first round, all requests at once, so that one word fits every machine.
    """

    value: float
    of_served: bool = False

    @classmethod
    def parse(cls, text: str) -> Rate:
        """`12.5`: requests a second; `70%`: of what `sequential` serves. Raises WorkloadError for anything else."""
        number, percent, rest = text.strip().partition("%")
        try:
            value = float(number) / (100 if percent else 1)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf or rest:
            raise WorkloadError(f"rate {text!r}: give requests a second, such as 12.5, or 70% of what is served.")
        return cls(value, bool(percent))

    def __str__(self) -> str:
        return f"{self.value:.3g} requests/s" if not self.of_served else f"{self.value:.3g} × what {BASE} serves"

    def requests_per_s(self, served: float) -> float:
        """This rate where `sequential` served so many requests a second.

        A share comes in three digits: by that number another part of the same reproduction can name it.
        """
        return float(f"{self.value * served:.3g}") if self.of_served else self.value


def arriving(work: Workload, rate: float) -> Workload:
    """The same requests, coming one by one: a Poisson process of `rate` requests a second, by the work's seed."""
    times = Workload.poisson(rate, len(work), seed=work.seed)
    pairs = zip(work.arrivals, times.arrivals, strict=True)
    return replace(work, name=times.name, arrivals=tuple(replace(a, arrival_s=at.arrival_s) for a, at in pairs))
