"""Learning rates from the spans that the lanes record anyway: both phases alone, and what overlap leaves of them.

Medians of recent spans, so that a slow first batch (a graph captured, a cache cold) does not count for long; of
pauses the longest, since it is what a limit on gaps is about.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import astuple
from itertools import pairwise
from statistics import fmean, median

from splitwiser_lab.engine.controller import Candidate, Line, Rates, Shares
from splitwiser_lab.engine.request import Request
from splitwiser_lab.timeline import Span

_RECENT = 9  # samples of a kind that count
_TRUSTED = 2  # samples of a candidate's shares before they replace what was expected
_MEMORY_SECONDS = 120.0  # then shares are forgotten, and a candidate that lost gets another chance
_COVERED = 0.5  # part of a prefill in which decode must have run for the two to count as overlapping
_RECENT_ENDS = 64  # requests whose lengths count
_DECODE_KEPT = 4096  # decode spans kept until the prefill beside them ends


class RateBook:
    """What was measured so far."""

    def __init__(self) -> None:
        self._prefill, self._decode = _Curve(flat=False), _Curve(flat=True)
        self._shares: dict[str, deque[tuple[float, Shares]]] = {}
        self._beside: deque[Span] = deque(maxlen=_DECODE_KEPT)

    def learn(self, span: Span, candidate: Candidate) -> None:
        """Take a span into account that ran while `candidate` was the choice."""
        if candidate.kind == "split":
            self._learn_split(span, candidate)
        elif span.phase == "mixed":
            self._learn_mixed(span, candidate)
        elif span.phase == "prefill":
            self._prefill.add(span.prefill_tokens, span.seconds)
        else:
            self._decode.add(span.decode_tokens, span.seconds)

    def rates(self, now: float) -> Rates:
        """What is known at `now`, on the clock of the spans."""
        shares = {}
        for label, samples in self._shares.items():
            while samples and now - samples[0][0] > _MEMORY_SECONDS:
                samples.popleft()
            if len(samples) >= _TRUSTED:
                seen = [share for _, share in samples]
                prefill, decode, _ = (median(part) for part in zip(*map(astuple, seen), strict=True))
                shares[label] = Shares(prefill, decode, max(share.pause for share in seen))
        return Rates(self._prefill.line(), self._decode.line(), shares)

    def chosen(self) -> None:
        """Another candidate runs from now on: the decode steps seen so far belong to the one before."""
        self._beside.clear()

    def _learn_mixed(self, span: Span, candidate: Candidate) -> None:
        prefill, decode = self._prefill.line(), self._decode.line()
        if not self._ran_before(candidate) or not prefill or span.seconds <= 0:
            return
        if decode:
            share = Shares(
                prefill.each * span.prefill_tokens / span.seconds, decode.at(span.decode_tokens) / span.seconds
            )
            self._shares[candidate.label].append((span.end, share))
        else:  # never seen alone: what the batch took longer than its prompt tokens do
            self._decode.add(span.decode_tokens, span.seconds - prefill.each * span.prefill_tokens)

    def _learn_split(self, span: Span, candidate: Candidate) -> None:
        """When a prefill ends, look at the decode steps that ran beside it."""
        if span.phase == "decode":
            self._beside.append(span)
            return
        steps = [step for step in self._beside if step.start >= span.start and step.end <= span.end]
        self._beside.clear()
        prefill, decode = self._prefill.line(), self._decode.line()
        if not steps or not prefill or not decode or span.seconds <= 0:
            return
        took = steps[-1].end - steps[0].start
        if took < _COVERED * span.seconds:
            return
        alone = sum(decode.at(step.decode_tokens) for step in steps)
        pauses = [(after.end - before.end) / decode.at(after.decode_tokens) for before, after in pairwise(steps)]
        pause = max([steps[0].seconds / decode.at(steps[0].decode_tokens), *pauses])
        if self._ran_before(candidate):
            share = Shares(prefill.at(span.prefill_tokens) / span.seconds, alone / took, pause)
            self._shares[candidate.label].append((span.end, share))

    def _ran_before(self, candidate: Candidate) -> bool:
        """False for a candidate's very first batch: much was made or loaded for it."""
        first = candidate.label not in self._shares
        self._shares.setdefault(candidate.label, deque(maxlen=_RECENT))
        return not first


class Lengths:
    """How many tokens requests write: learned from those that ended."""

    def __init__(self) -> None:
        self._open: dict[int, Request] = {}
        self._ended: deque[int] = deque(maxlen=_RECENT_ENDS)

    def look(self, requests: Iterable[Request]) -> None:
        """Take note of what runs now, and of what ran at the last look and has ended."""
        for request in [request for request in self._open.values() if request.done]:
            del self._open[request.id]
            self._ended.append(len(request.output))
        self._open.update((request.id, request) for request in requests)

    def left(self, request: Request) -> int:
        """Tokens that a request is expected to write yet: what it asked for, but no more than others of late.

        Of those, only they count that wrote more than it has so far: that shorter ones ended says nothing of it.
        """
        written = len(request.output)
        left = request.sampling.max_new_tokens - written
        longer = [ended for ended in self._ended if ended > written]
        return min(left, round(fmean(longer)) - written) if longer else left


class _Curve:
    """Seconds by amount: a median for each size (in steps of the square root of 2), and a line through them."""

    def __init__(self, flat: bool) -> None:
        """`flat`: with a single size seen, take the time as the same for all sizes; else as proportional."""
        self._flat = flat
        self._sizes: dict[int, deque[tuple[int, float]]] = {}
        self._line: Line | None = None
        self._changed = False

    def add(self, amount: int, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            size = round(2 * math.log2(amount))
            self._sizes.setdefault(size, deque(maxlen=_RECENT)).append((amount, seconds))
            self._changed = True

    def line(self) -> Line | None:
        """The line of least squares through the medians, with neither part below 0; None before the first sample."""
        if self._changed:
            points = [(median(a for a, _ in seen), median(s for _, s in seen)) for seen in self._sizes.values()]
            self._line, self._changed = _fit(points, self._flat), False
        return self._line


def _fit(points: list[tuple[float, float]], flat: bool) -> Line:
    amount = sum(a for a, _ in points) / len(points)
    seconds = sum(s for _, s in points) / len(points)
    spread = sum((a - amount) ** 2 for a, _ in points)
    if spread == 0:
        return Line(seconds, 0.0) if flat else Line(0.0, seconds / amount)
    each = sum((a - amount) * (s - seconds) for a, s in points) / spread
    if each <= 0:
        return Line(seconds, 0.0)
    if each * amount > seconds:  # through the origin
        return Line(0.0, sum(a * s for a, s in points) / sum(a * a for a, _ in points))
    return Line(seconds - each * amount, each)
