"""Mode `auto`: watches the work at hand, asks the controller, and hands the core another mode when that pays.

The choice itself is arithmetic (`controller`), the rates come from the spans (`rates`). Here both meet the
engine: which modes this machine can choose among, what is waiting, and when a change is in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch

from splitwiser_lab.engine.controller import Candidate, Decision, Load, Shares, decide
from splitwiser_lab.engine.core import Core, ModeSwitch
from splitwiser_lab.engine.modes import find_mode
from splitwiser_lab.engine.rates import RateBook
from splitwiser_lab.errors import LaneError, ModeError
from splitwiser_lab.hardware import cores
from splitwiser_lab.timeline import Span

Prepare = Callable[[str, dict[str, Any]], ModeSwitch]

_SPLITS = (0.25, 0.375, 0.5)  # parts of the SMs for decode that are worth trying
_LOOK_SECONDS = 0.005  # between two looks at an unchanged queue
_DRY_SECONDS = 0.01  # for which no prompt must have waited before lanes give up their split
_DWELL_SECONDS = 0.1  # between two changes while both phases have work
_OLD_SPANS = 2000  # of the modes before, to learn from at the start
_TURNS = Candidate("sequential", "turns")


class Governor:
    """Called by the core before each step; gives the switch to make now, or None."""

    def __init__(
        self,
        core: Core,
        switches: list[tuple[Candidate, ModeSwitch]],
        left_out: dict[str, str],
        itl_limit_ms: float | None,
    ) -> None:
        """`switches` has a ready switch for each candidate, the first of which takes turns."""
        self._core, self._left_out, self._limit_ms = core, left_out, itl_limit_ms
        self._switches = {candidate.label: replace(s, controller=self) for candidate, s in switches}
        self._candidates = tuple(candidate for candidate, _ in switches)
        self._book = RateBook()
        self._current = self._before = self._candidates[0]
        self._decision: Decision | None = None
        self._last: Span | None = None
        self._changed = self._looked = 0.0
        self._dry_since: float | None = None
        self._queue = (-1, -1)
        self._changes = 0
        for span in list(core.spans)[-_OLD_SPANS:]:
            if span.mode in ("sequential", "chunked") and span.phase != "mixed":
                self._book.learn(span, _TURNS)
            self._last = span

    @property
    def start(self) -> ModeSwitch:
        """The switch with which `auto` begins: phases take turns."""
        return self._switches[self._current.label]

    def __call__(self) -> ModeSwitch | None:
        now = time.perf_counter()
        queue = (len(self._core.scheduler.waiting), len(self._core.scheduler.running))
        if queue == self._queue and now - self._looked < _LOOK_SECONDS:
            return None
        self._queue, self._looked = queue, now
        self._learn()
        load, prefill_under_way = self._load()
        rates = self._book.rates(now)
        decision = decide(self._candidates, rates, load, self._current, self._limit_ms)
        if load.decoding or load.prefill_tokens:
            self._decision = decision
        if decision.choice == self._current or not self._in_order(load, prefill_under_way, now):
            return None
        self._before, self._current = self._current, decision.choice
        self._changed, self._changes = now, self._changes + 1
        self._book.chosen()
        return self._switches[decision.choice.label]

    def _in_order(self, load: Load, prefill_under_way: bool, now: float) -> bool:
        """Whether this is a moment to change: lanes must drain, so never in the middle of a long prefill."""
        dry = not load.prefill_tokens
        self._dry_since = (self._dry_since or now) if dry else None
        if self._current.kind == "split" and prefill_under_way:
            return False
        if dry:
            assert self._dry_since is not None
            return now - self._dry_since >= _DRY_SECONDS
        return self._current.kind == "turns" or now - self._changed >= _DWELL_SECONDS

    def _learn(self) -> None:
        """Read the spans that are new. Those from before the last change belong to the choice before it."""
        new = list(takewhile(lambda span: span is not self._last, reversed(self._core.spans)))
        since = self._core.mode.time
        for span in reversed(new):
            self._book.learn(span, self._current if span.start >= since else self._before)
            self._last = span

    def _load(self) -> tuple[Load, bool]:
        """What can run now; prompts for which there is no room are not at hand. And whether a prefill is under way."""
        scheduler = self._core.scheduler
        decoding = waiting = tokens = 0
        under_way = False
        for request in scheduler.running:
            behind = len(request.prompt) + len(request.output) - request.computed
            if request.output and behind <= 1:
                decoding += 1
            else:
                waiting, tokens = waiting + 1, tokens + behind
                under_way = under_way or bool(request.under_way)
        room = scheduler.pages.free - len(scheduler.running)
        places = scheduler.limits.max_requests - len(scheduler.running)
        for request in list(scheduler.waiting)[: max(places, 0)]:
            room -= scheduler.pages.needed(request, request.length)
            if room < 0 and waiting + decoding:
                break
            waiting, tokens = waiting + 1, tokens + request.length
        return Load(decoding, waiting, tokens), under_way

    def explain(self) -> str:
        """What runs and why, what was predicted of every choice, and what is not among them."""
        decision = self._decision
        limit = "no limit on the gap between tokens" if self._limit_ms is None else f"gaps within {self._limit_ms:g} ms"
        lines = [f"auto runs {self._current.label} ({limit}; {self._changes} changes so far)."]
        if decision is None:
            lines.append("No request came yet, so nothing was measured: the phases take turns until then.")
        else:
            load = decision.load
            lines.append(
                f"At the last look {load.decoding} requests decoded and {load.waiting} prompts of together "
                f"{load.prefill_tokens:,} tokens waited: {decision.reason}."
            )
            lines += [f"- {prediction}" for prediction in decision.predictions]
        lines += [f"- {mode} is no choice: {why}." for mode, why in self._left_out.items()]
        return "\n".join(lines)


def govern(core: Core, prepare: Prepare, device: str, chunk_tokens: int, options: dict[str, Any]) -> Governor:
    """A governor over every mode worth choosing on `device`, their lanes started. Raises as `prepare` for sequential.

    `prepare` starts the lanes of a mode and gives the switch to it; `options` are those of `auto`.
    """
    common = {name: value for name, value in options.items() if name != "itl_limit_ms"}
    possible, left_out = candidates(device, chunk_tokens)
    switches: list[tuple[Candidate, ModeSwitch]] = []
    for candidate in possible:
        try:
            switch = prepare(candidate.mode, {**common, **candidate.options})
        except (LaneError, ModeError) as error:
            if candidate.kind == "turns":
                raise
            left_out[candidate.label] = str(error).rstrip(".")
            continue
        change = replace(switch.change, mode="auto", options=options, runs=candidate.label)
        switches.append((candidate, replace(switch, change=change)))
    return Governor(core, switches, left_out, options.get("itl_limit_ms"))


def candidates(device: str, chunk_tokens: int) -> tuple[list[Candidate], dict[str, str]]:
    """What `auto` chooses among on `device`, turns first, and what is left out and why.

    The priors are rough figures from an H200 and a two-core CPU; what is measured takes their place.
    """
    found = [_TURNS, Candidate("chunked", "mixed", {"chunk_tokens": chunk_tokens})]
    left_out: dict[str, str] = {}

    def available(mode: str) -> bool:
        try:
            find_mode(mode, device)
        except ModeError as error:
            left_out[mode] = str(error).rstrip(".")
        return mode not in left_out

    if torch.device(device).type == "cpu":
        count = len(cores())
        if count < 2:
            left_out["processes"] = "there is one core, which two phases cannot share"
        elif available("processes"):
            part = max(1, count // 2) / count
            found.append(Candidate("processes", "split", {}, Shares(1 - part, min(0.95, 1.8 * part))))
        return found, left_out
    if available("partitioned"):
        for sms, part in splits(device, _SPLITS):
            prior = Shares(0.97 * (1 - part), min(0.95, 1.6 * part))
            found.append(Candidate("partitioned", "split", {"decode_sms": sms}, prior))
        left_out["streams, mps, processes"] = "where SMs can be divided, that was better wherever it was measured"
    elif available("mps"):
        found.append(Candidate("mps", "split", {}, Shares(0.74, 0.5)))
    elif available("streams"):
        found.append(Candidate("streams", "split", {}, Shares(0.79, 0.37)))
    return found, left_out


def splits(device: str, parts: Sequence[float]) -> list[tuple[int, float]]:
    """The possible numbers of SMs for decode nearest to these parts of all, and which part each really is."""
    from splitwiser_lab.lanes.partition import grid_of
    from splitwiser_lab.lanes.support import index_of

    grid = grid_of(index_of(torch.device(device)))
    allowed = grid.allowed
    sms = {min(allowed, key=lambda n: abs(n - part * grid.total)) for part in parts}
    return [(n, n / grid.total) for n in sorted(sms)]
