"""Mode `auto`: watches the work at hand, asks the controller, and hands the core another mode when that pays.

The choice itself is arithmetic (`controller`), the rates come from the spans (`rates`). Here both meet the
engine: which modes this machine can choose among, what is waiting, and when a change is in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import islice, takewhile
from typing import Any

from splitwiser_lab.engine.choices import TURNS, candidates
from splitwiser_lab.engine.controller import Candidate, Decision, Load, decide
from splitwiser_lab.engine.core import Core
from splitwiser_lab.engine.rates import Lengths, RateBook
from splitwiser_lab.engine.station import ModeSwitch
from splitwiser_lab.errors import HardwareError, LaneError, ModeError
from splitwiser_lab.lanes.support import LaneKind
from splitwiser_lab.timeline import Span

Prepare = Callable[[str, dict[str, Any]], ModeSwitch]

_LOOK_SECONDS = 0.005  # between two looks at an unchanged queue
_DRY_SECONDS = 0.01  # for which no prompt must have waited before lanes give up their split
_DWELL_SECONDS = 0.1  # between two changes while both phases have work
_OLD_SPANS = 2000  # of each phase alone on the device, to learn from at the start


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
        self._book, self._lengths = RateBook(), Lengths()
        self._current = self._before = self._candidates[0]
        self._decision: Decision | None = None  # the last one about some work
        self._compared: Decision | None = None  # the last one about both phases
        self._last: Span | None = None
        self._changed = self._looked = 0.0
        self._dry_since: float | None = None
        self._queue = (-1, -1)
        self._changes = 0
        alone = (s for s in reversed(core.spans) if s.mode in ("sequential", "chunked") and s.phase != "mixed")
        for span in reversed(list(islice(alone, _OLD_SPANS))):
            self._book.learn(span, TURNS)
        self._last = core.spans[-1] if core.spans else None

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
        load = self._load(now)
        rates = self._book.rates(now)
        decision = decide(self._candidates, rates, load, self._current, self._limit_ms)
        if load.decoding or load.prefill_tokens:
            self._decision = decision
            self._compared = decision if decision.predictions else self._compared
        if decision.choice == self._current or not self._in_order(load, now):
            return None
        self._before, self._current = self._current, decision.choice
        self._changed, self._changes = now, self._changes + 1
        self._book.chosen()
        return self._switches[decision.choice.label]

    def _in_order(self, load: Load, now: float) -> bool:
        """Whether this is a moment to change: each costs a moment in which lanes drain, so not all the time."""
        if load.prefill_tokens:
            self._dry_since = None
            return self._current.kind == "turns" or now - self._changed >= _DWELL_SECONDS
        self._dry_since = now if self._dry_since is None else self._dry_since
        return now - self._dry_since >= _DRY_SECONDS

    def _learn(self) -> None:
        """Read the spans that are new. Those from before the last change belong to the choice before it."""
        new = list(takewhile(lambda span: span is not self._last, reversed(self._core.spans)))
        since = self._core.mode.time
        for span in reversed(new):
            self._book.learn(span, self._current if span.start >= since else self._before)
            self._last = span

    def _load(self, now: float) -> Load:
        """What can run now; prompts for which there is no room are not at hand."""
        scheduler = self._core.scheduler
        decoding = waiting = joining = tokens = answers = 0
        stalled = 0.0
        self._lengths.look(scheduler.running)
        for request in scheduler.running:
            answers += (left := self._lengths.left(request))
            behind = len(request.prompt) + len(request.output) - request.computed
            if request.output and behind <= 1:
                decoding, stalled = decoding + 1, max(stalled, now - request.token_times[-1])
            else:
                waiting, joining, tokens = waiting + 1, joining + (left > 1), tokens + behind
        room = scheduler.pages.free - len(scheduler.running)
        places = scheduler.limits.max_requests - len(scheduler.running)
        for request in list(scheduler.waiting)[: max(places, 0)]:
            room -= scheduler.pages.needed(request, request.length)
            if room < 0 and waiting + decoding:
                break
            answers += (left := self._lengths.left(request))
            waiting, joining, tokens = waiting + 1, joining + (left > 1), tokens + request.length
        return Load(decoding, waiting, tokens, answers, stalled, joining)

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
        if self._compared is not None:
            if self._compared is not decision:
                lines.append(f"When both phases last had work: {self._compared.reason}.")
            lines += [f"- {prediction}" for prediction in self._compared.predictions]
        else:
            lines.append(f"It can choose among {', '.join(candidate.label for candidate in self._candidates)}.")
        lines += [f"- {mode} is no choice: {why}." for mode, why in self._left_out.items()]
        return "\n".join(lines)


def govern(
    core: Core,
    prepare: Prepare,
    device: str,
    chunk_tokens: int,
    options: dict[str, Any],
    running: Collection[LaneKind] = (),
) -> Governor:
    """A governor over every mode worth choosing on `device`, their lanes started. Raises as `prepare` for sequential.

    `prepare` starts the lanes of a mode and gives the switch to it; `options` are those of `auto`; of kinds
    `running` there are lanes already.
    """
    common = {name: value for name, value in options.items() if name not in ("itl_limit_ms", "with_processes")}
    possible, left_out = candidates(device, chunk_tokens, running, bool(options.get("with_processes")))
    switches: list[tuple[Candidate, ModeSwitch]] = []
    for candidate in possible:
        try:
            switch = prepare(candidate.mode, {**common, **candidate.options})
        except (HardwareError, LaneError, ModeError) as error:
            if candidate.kind == "turns":
                raise
            left_out[candidate.label] = str(error).rstrip(".")
            continue
        change = replace(switch.change, mode="auto", options=options, runs=candidate.label)
        switches.append((candidate, replace(switch, change=change)))
    return Governor(core, switches, left_out, options.get("itl_limit_ms"))
