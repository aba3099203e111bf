"""Several ways to do the same work, by turns: what every reproduction does, whichever pipeline it is of.

The first round of everything comes first, then the second: all ways, output lengths and rates have had a turn when
one of them has another. What was measured can be asked for at any time, and so can what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

from splitwiser_lab.errors import HardwareError, LaneError, ModeError
from splitwiser_lab.measure.reference import Reference, TokenCheck
from splitwiser_lab.measure.workload import Workload
from splitwiser_lab.pipelines.arrivals import Rate, arriving
from splitwiser_lab.pipelines.budget import Budget, Pace
from splitwiser_lab.pipelines.plan import Placed, Plan
from splitwiser_lab.pipelines.rows import BASE, LeftOut, Row, name_of_work
from splitwiser_lab.pipelines.runners import AllAtOnce, Launched, Runner, prompts_of

_REFERENCE = "generate"
_UNDER_WAY = "not measured yet when this was written"
_Cell = tuple[str, int, Rate | None]  # way, new tokens, how requests come (None: all at once)
_Check = Callable[[int, tuple[int, ...]], TokenCheck]


@dataclass
class Turns:
    """Lets all runners do the same work by turns. What cannot run goes to `skipped`, with its reason.

    With `rates`, the same requests also come one by one, at each of them, to all that take them so. With
    `start_together`, all processes start side by side, which is faster; what each start took, and what memory is
    whose, is not told then, and memory that none has taken yet is offered to all: let them be few enough. What the
    `budget` has no time for is left out.
    """

    runners: dict[str, Runner]
    experiment: Plan
    judge: Reference
    skipped: dict[str, str]
    report: Callable[[str], None]
    rates: Sequence[Rate] = ()
    start_together: bool = False
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        self._pace = Pace()
        self._wanted: list[_Cell] = []
        self._repeats = 0
        self._rows: dict[_Cell, Row] = {}
        self._why: dict[_Cell, str] = {}
        self._measured = 0  # all rounds of all rows
        self._missing = _UNDER_WAY  # why cells without a reason of their own were not measured
        self._checks: dict[int, _Check] = {}
        self._ready: dict[int, list[str]] = {}  # ways that take turns, by output length
        self._per_second: dict[tuple[int, Rate | None], float] = {}
        self._started, self._launched = set[str](), set[str]()
        self._written: Callable[[], None] = lambda: None

    @property
    def rows(self) -> tuple[Row, ...]:
        """What was measured so far: a row for each way, output length and way of arriving."""
        return tuple(self._rows[cell] for cell in self._wanted if cell in self._rows and self._rows[cell].repeats)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What is missing in some round, or in all, and why; without what cannot run, which is in `skipped`."""
        found = []
        for cell in self._wanted:
            name, output, _ = cell
            done = self._rows[cell].repeats if cell in self._rows else 0
            refused = name in self.skipped or name_of_work(name, output) in self.skipped
            if done < self._repeats and not refused:
                found.append(LeftOut(self._what(cell), self._why.get(cell, self._missing), self._repeats))
        return tuple(found)

    def run(self, outputs: Sequence[int], repeats: int, written: Callable[[], None] = lambda: None) -> None:
        """Measure all ways with each number of new tokens, `repeats` times. `written` is called after each measurement.

        Raises what the comparison cannot do without: errors of `generate` and of `sequential`, and an interrupt; what
        was measured until then stays.
        """
        arrivals = tuple(dict.fromkeys((None, *self.rates)))
        cells = [(name, output, rate) for output in outputs for rate in arrivals for name in self.runners]
        batches = {name for name, runner in self.runners.items() if name == _REFERENCE or isinstance(runner, AllAtOnce)}
        self._wanted = [cell for cell in cells if cell[2] is None or cell[0] not in batches]
        self._repeats, self._written = repeats, written
        try:
            written()
            for number in range(repeats):
                before = self._measured
                for output in outputs:
                    if number == 0:
                        self._ready[output] = self._begin(output)
                    for rate in arrivals:
                        self._round(number, output, rate, self._ready[output])
                for output in outputs if number == 0 else ():
                    self._start_late(output, arrivals)
                if self._measured == before:
                    break  # nor will there be time for another
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            said = str(error).partition("\n")[0]
            self._missing = "interrupted before it was measured" if stopped else f"the run ended first: {said}"
            written()
            raise

    # -- starting

    def _begin(self, output: int) -> list[str]:
        """Ask for the reference's tokens, and start and warm up all ways; those that are ready."""
        cells = [cell for cell in self._wanted if cell[1] == output]
        if self._no_time(self._pace.reference(output), cells):
            return []
        work = self.experiment.workload(output)
        self.report(f"{output} new tokens: asking transformers for the reference's tokens")
        prompts, begun = prompts_of(work, self.judge.model), self.budget.now()
        _, expected = self.runners[_REFERENCE](work)
        self._pace.reference_took(output, self.budget.now() - begun)
        theirs = [self.judge.continuation(*pair) for pair in zip(prompts, expected, strict=True)]

        @cache  # many ways and rounds write the same tokens
        def check(number: int, ours: tuple[int, ...]) -> TokenCheck:
            return theirs[number].check(ours)

        self._checks[output] = check
        if self.start_together:
            self._launch(output, work)
        ready = [_REFERENCE]  # the reference's tokens came from it
        if not self._start(BASE, output, ready):
            self._leave_out(cells, self._why[BASE, output, None])
            return []
        ready.append(BASE)
        for name in self.runners:
            if name not in (_REFERENCE, BASE) and self._start(name, output, ready):
                ready.append(name)
        return ready

    def _launch(self, output: int, work: Workload) -> None:
        longest, started = 0.0, list[Callable[[Workload], None]]()
        for name, runner in self.runners.items():
            if not isinstance(runner, Launched) or name in self.skipped:
                continue
            if self.budget.lacks(longest + self._first_rounds([*self._launched, name], output)):
                break  # `_start` says so
            self.report(f"starting {name}")
            begun = self.budget.now()
            with suppress(HardwareError, LaneError, ModeError):  # the warm-up comes to it again, and knows what to do
                runner.launch(work)
                started.append(runner.launch)
            self._launched.add(name)
            longest = max(longest, self.budget.now() - begun)
        for launch in started:  # now those of their processes that waited for another's
            with suppress(HardwareError, LaneError, ModeError):
                launch(work)

    def _start(self, name: str, output: int, ready: Sequence[str]) -> bool:
        """Start a way and run it once. False where it cannot run, or where no time would be left to measure it."""
        if name in self.skipped:
            return False
        placement = self._placement(name)
        work = self.experiment.warm_up(output, placement.processes if placement else 1)
        whole = len(self.experiment.workload(output))
        warm = self._pace.round(name, output) * len(work) / whole
        started = name in self._started or name in self._launched  # and by now as ready as the first that is waited for
        needed = max(warm, 0.0 if started else self._pace.start()) + self._first_rounds([*ready, name], output)
        cells = [cell for cell in self._wanted if cell[:2] == (name, output)]
        if self._no_time(needed, cells, "its start and a round of what has started need"):
            return False
        self.report(f"{output} new tokens: starting and warming up {name}")
        begun = self.budget.now()
        try:
            figures, _ = self.runners[name](work)
        except (HardwareError, LaneError, ModeError) as error:
            if name == BASE:
                raise
            lacks_room = isinstance(error, HardwareError)  # which other lengths may leave
            self.skipped[name_of_work(name, output) if lacks_room else name] = str(error)
            self._written()
            return False
        if not started:
            self._pace.start_took(self.budget.now() - begun)
        self._started.add(name)
        if len(work) == whole and "duration" in figures:  # a round by its own clock, without what the start took
            self._pace.round_took(name, output, None, figures["duration"])
        for cell in cells:
            self._why.pop(cell, None)
        return True

    def _start_late(self, output: int, arrivals: Sequence[Rate | None]) -> None:
        """Start ways that seemed to have no time: what a round takes is known by now. They have a first round, too."""
        ready = self._ready[output]
        late = [name for name in self.runners if ready and name not in ready and self._start(name, output, [BASE])]
        ready += late
        for rate in arrivals if late else ():
            self._round(0, output, rate, [BASE, *late])

    def _first_rounds(self, names: Sequence[str], output: int) -> float:
        """Seconds of one round of these ways, all requests at once."""
        return sum(self._pace.round(name, output) for name in names)

    # -- measuring

    def _round(self, number: int, output: int, rate: Rate | None, among: Sequence[str]) -> None:
        """One measurement of each way: `sequential` first, with which the others are compared, `generate` last."""
        names = [name for name in among if (name, output, rate) in self._wanted]
        names.sort(key=lambda name: (name != BASE, name == _REFERENCE))
        if not names:
            return
        work, per_second = self.experiment.workload(output), None
        if rate is not None:
            if (BASE, output, None) not in self._rows:
                self._leave_out([(name, output, rate) for name in names], self._why[BASE, output, None])
                return
            per_second = self._rate(output, rate)
            work = arriving(work, per_second)
        last = work.arrivals[-1].arrival_s
        needs = {name: self._pace.round(name, output, rate, last) for name in names}
        others = [needs[name] for name in names if name not in (BASE, _REFERENCE)]
        needs[BASE] += min(others, default=0.0)  # alone it is compared with nothing
        for name in names:
            cell = (name, output, rate)
            if self._no_time(needs[name], [cell]):
                if name == BASE:
                    self._leave_out([(other, output, rate) for other in names[1:]], self._why[cell])
                    return
                continue
            self.report(f"round {number + 1} of {self._repeats}: {name_of_work(name, output, per_second)}")
            self._measure(cell, work, per_second)

    def _rate(self, output: int, rate: Rate) -> float:
        """Requests a second, the same in every round; a share is of what `sequential` served in the first."""
        if (output, rate) not in self._per_second:
            served = self._rows[BASE, output, None].samples.get("request_throughput", [0.0])[0]
            self._per_second[output, rate] = rate.requests_per_s(served)
        return self._per_second[output, rate]

    def _measure(self, cell: _Cell, work: Workload, per_second: float | None) -> None:
        name, output, rate = cell
        begun = self.budget.now()
        try:
            figures, tokens = self.runners[name](work)
        except (HardwareError, LaneError) as error:
            if name in (BASE, _REFERENCE):
                raise
            self._leave_out([other for other in self._wanted if other[:2] == cell[:2]], str(error))
            self._ready[output].remove(name)
            return
        self._pace.round_took(name, output, rate, self.budget.now() - begun)
        checks = list(map(self._checks[output], range(len(work)), map(tuple, tokens)))
        row = self._rows.setdefault(cell, self._row(name, output, per_second))
        row.judge(checks)
        row.add(figures)
        base = self._rows[BASE, output, rate].samples["output_throughput"][-1]
        row.add({"over_sequential": row.samples["output_throughput"][-1] / base})
        self._measured += 1
        self._written()

    def _no_time(self, needed: float, cells: Sequence[_Cell], what: str = "it needs") -> bool:
        """Whether there is no time for something; then these are left out."""
        why = self.budget.lacks(needed, what)
        if why:
            self._leave_out(cells, why)
        return bool(why)

    def _leave_out(self, cells: Sequence[_Cell], why: str) -> None:
        new = [cell for cell in cells if cell not in self._why]
        self._why.update(dict.fromkeys(new, why))
        if new:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            self.report(f"{self._what(new[0])}{more} left out: {why}")
            self._written()

    def _what(self, cell: _Cell) -> str:
        name, output, rate = cell
        if rate is not None and (output, rate) not in self._per_second:
            return f"{name_of_work(name, output)}, {rate}"
        return name_of_work(name, output, self._per_second.get((output, rate)))

    def _placement(self, name: str) -> Placed | None:
        return next((placement for placement in self.experiment.placements if str(placement) == name), None)

    def _row(self, name: str, output: int, rate: float | None) -> Row:
        placement = self._placement(name)
        if placement is None:
            return Row(name, output, name.partition(":")[0], rate=rate)
        return Row(name, output, placement.mode, placement.processes, placement.mps, rate)
