"""How long a reproduction may take, and what its parts will take, judged by what they took so far in this run."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable

from splitwiser_lab.errors import RequestError
from splitwiser_lab.pipelines.rows import BASE


class Budget:
    """`seconds` from now on, None for as many as it takes. Nothing is cut: what would end too late does not begin."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises RequestError for a number that is no time."""
        if seconds is not None and not 0 < seconds < math.inf:
            raise RequestError(f"seconds={seconds}: give a time in seconds, more than 0.")
        self.seconds, self.now = seconds, clock
        self._begun = clock()

    @property
    def left(self) -> float:
        """Seconds that are left, 0 at the least."""
        return math.inf if self.seconds is None else max(0.0, self._begun + self.seconds - self.now())

    def lacks(self, needed: float, what: str = "it needs") -> str:
        """Why something that takes `needed` seconds cannot begin any more; empty if it can. `what` needs them."""
        left = self.left
        if left > 0 and left >= needed:
            return ""
        about = f", and {what} about {needed:.0f} s" if needed >= 1 else ""
        return f"no time: {left:.0f} s of {self.seconds:.0f} s are left{about}"


def reason_of(why: str) -> str:
    """A reason for leaving something out, short where it is the time: how much was left then is told by each itself."""
    found = re.match(r"(no time: )[0-9]+ s of ([0-9]+ s) are left", why)
    return f"{found[1]}{found[2]} in all" if found else why


class Pace:
    """Seconds that the parts of a run took, and by them an estimate for those to come; 0 where nothing is known.

    A round takes what the same round took before; else what the same way took with another output length, in
    proportion to the reference's; else what `sequential`, or at first the reference, took for the same work.
    """

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._references: dict[int, float] = {}
        self._rounds: dict[tuple[str, int, object], float] = {}

    def start_took(self, seconds: float) -> None:
        """Of a way that was started and warmed up."""
        self._starts.append(seconds)

    def reference_took(self, output: int, seconds: float) -> None:
        """Of the reference's tokens, `output` for each request."""
        self._references[output] = seconds

    def round_took(self, name: str, output: int, arrivals: object, seconds: float) -> None:
        """Of one round; `arrivals` is None where all requests came at once.

        Checking its tokens is not in it: that takes long once, when the reference is first asked about a request.
        """
        self._rounds[name, output, arrivals] = seconds

    def start(self) -> float:
        """Of another start: as the longest."""
        return max(self._starts, default=0.0)

    def reference(self, output: int) -> float:
        """Of the reference's tokens: at most in proportion to their number."""
        if output in self._references or not self._references:
            return self._references.get(output, 0.0)
        other = max(self._references)
        return self._references[other] * max(1.0, output / other)

    def round(self, name: str, output: int, arrivals: object = None, last_arrival: float = 0.0) -> float:
        """Of a round whose last request comes after so many seconds."""
        if (name, output, arrivals) in self._rounds:
            return self._rounds[name, output, arrivals]
        return max(last_arrival, self._at_once(name, output))

    def _at_once(self, name: str, output: int) -> float:
        reference = self.reference(output)
        seen = {other: s for (way, other, arrivals), s in self._rounds.items() if way == name and arrivals is None}
        if output in seen or not seen:
            return seen.get(output, self._rounds.get((BASE, output, None), reference))
        other = max(seen)
        beside = self.reference(other)
        return seen[other] * (reference / beside if beside else 1.0)
