"""Which mode pays for the work at hand: pure arithmetic over measured rates, for mode `auto`.

It knows no lane, no clock and no request. Each way to run both phases is described by two shares: what
is left of the prefill rate and of the decode rate that each phase has alone on the whole device. Their
sum is the overlap gain: above 1, doing both at once beats taking turns.

    taking turns   prefill 1, decode 0 while prompts wait: the stall is the whole prefill
    mixed batches  both below 1; the gap between two tokens is the time of a mixed batch
    split lanes    both below 1; the gap is two slow decode steps: a request handed over just after one
                   began waits for it to end, and then for its own

The limit on that gap comes first, with a tenth to spare; with half of it where phases take turns, for while decode
stalls the next prompt may come, and nothing can be changed before this one is done. Among those that keep it, a
short queue wants its first tokens soon, and throughput counts for little: the highest prefill rate wins. A long
queue, or no limit, wants the most worth.

Decoding early is worth less than it looks when many prompts wait: a step over 4 requests costs nearly as
much as one over 32, so a token decoded now saves only its part of a fuller step later. And decode counts for
no more than there is to decode: beside long prompts with short answers, whatever slows prefill down loses. `worth`
is the gain with the decode share reduced by just that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["turns", "mixed", "split"]
MARGIN = 0.05  # a change must promise this much more than what runs now
SPARE = {"turns": 0.5, "mixed": 0.1, "split": 0.1}  # of the limit, kept for what no prediction knows of
LONG_QUEUE_SECONDS = 0.2  # of prefill at the rate alone: from here on throughput decides


@dataclass(frozen=True)
class Shares:
    """What both phases keep of their rates alone while they run together; 1 is all of it.

    `pause` is the longest time between two decode steps beside a prefill, in steps alone; 0 when not measured.
    """

    prefill: float
    decode: float
    pause: float = 0.0

    @property
    def gain(self) -> float:
        """The overlap gain."""
        return self.prefill + self.decode


@dataclass(frozen=True)
class Candidate:
    """A mode with options that `auto` may choose. `prior` is expected of it until it was measured.

    `divides` says of split lanes that a phase has its part of the device and no more, even while the other is idle.
    """

    mode: str
    kind: Kind
    options: dict[str, Any] = field(default_factory=dict)
    prior: Shares = Shares(1.0, 0.0)
    divides: bool = True

    @property
    def label(self) -> str:
        """E.g. `partitioned (decode_sms=64)`."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.mode} ({options})" if options else self.mode


@dataclass(frozen=True)
class Load:
    """The work at hand: requests decoding, requests whose prompt is not done, and the tokens of those prompts.

    `decode_tokens` are those that all of them together are expected to write yet; None for more than matters. Of
    those that wait, `joining` will decode (None: all): the others write one token, at the end of their prompt. One
    of those that decode has its last token since `stalled` seconds.
    """

    decoding: int
    waiting: int
    prefill_tokens: int
    decode_tokens: int | None = None
    stalled: float = 0.0
    joining: int | None = None


@dataclass(frozen=True)
class Line:
    """Seconds as a function of an amount: `fixed + each * amount`."""

    fixed: float
    each: float

    def at(self, amount: float) -> float:
        """Seconds for this amount."""
        return self.fixed + self.each * amount


@dataclass(frozen=True)
class Rates:
    """What was measured: both phases alone (None: not yet), and candidates' shares by label.

    `prefill` maps the tokens of a batch, `decode` the sequences of a step, to seconds on the whole device.
    """

    prefill: Line | None = None
    decode: Line | None = None
    shares: dict[str, Shares] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What a candidate would make of the load. `gap_ms` is the longest pause between two tokens of a request.

    `verdict` says why it was chosen, or why not.
    """

    candidate: Candidate
    shares: Shares
    measured: bool
    prefill_tok_s: float
    step_ms: float
    gap_ms: float
    worth: float
    verdict: str = ""

    def keeps(self, limit_ms: float | None) -> bool:
        """Whether the gap stays within the limit, with something to spare."""
        return limit_ms is None or self.gap_ms <= limit_ms * (1 - SPARE[self.candidate.kind])

    def __str__(self) -> str:
        known = "measured" if self.measured else "expected, not yet measured"
        decode = (
            f"decode at {self.shares.decode:.2f} of its rate alone" if self.shares.decode else "no decode meanwhile"
        )
        verdict = f" {self.verdict[0].upper()}{self.verdict[1:]}." if self.verdict else ""
        return (
            f"{self.candidate.label}: prefill at {self.shares.prefill:.2f} of its rate alone "
            f"({self.prefill_tok_s:,.0f} tok/s), {decode} ({known}); overlap gain {self.shares.gain:.2f}, worth "
            f"{self.worth:.2f}; longest gap between two tokens {self.gap_ms:.1f} ms.{verdict}"
        )


@dataclass(frozen=True)
class Decision:
    """The choice, the reason in a sentence, and what was predicted of every candidate."""

    choice: Candidate
    reason: str
    load: Load
    predictions: tuple[Prediction, ...] = ()


def decide(
    candidates: Sequence[Candidate],
    rates: Rates,
    load: Load,
    current: Candidate,
    itl_limit_ms: float | None = None,
) -> Decision:
    """Choose among `candidates`; the first one must take turns, and is the one to fall back to.

    With one phase alone at work, the whole device belongs to it. With both, the limit comes first: of those that
    keep it with something to spare, the one of most worth, or, while the queue is short, the one with the soonest first
    token; when none keeps it, the one with the shortest gap. What runs now stays unless another promises 5 % more.
    Raises ValueError when the first candidate does not take turns.
    """
    turns = candidates[0]
    if turns.kind != "turns":
        raise ValueError(f"the first candidate must take turns, and {turns.label} does not")
    if rates.prefill is None or rates.decode is None:
        return _unmeasured(candidates, rates, load)
    if not load.decoding or not load.prefill_tokens:
        return _one_phase(turns, load, current)
    predictions = tuple(predict(candidate, rates, load) for candidate in candidates)
    short = rates.prefill.at(load.prefill_tokens) < LONG_QUEUE_SECONDS
    return _best(predictions, load, current, itl_limit_ms, short)


def predict(candidate: Candidate, rates: Rates, load: Load) -> Prediction:
    """What `candidate` would do with a load of both phases. Both phases alone must be measured."""
    assert rates.prefill is not None and rates.decode is not None
    tokens = load.prefill_tokens / max(load.waiting, 1)
    alone_tok_s = tokens / max(rates.prefill.at(tokens), 1e-9)
    step = rates.decode.at(load.decoding)
    shares = rates.shares.get(candidate.label) or _prior(candidate, rates, load)
    if candidate.kind == "turns":
        gap = load.stalled + rates.prefill.at(load.prefill_tokens) + step
    else:
        gap = step * max((2 if candidate.kind == "split" else 1) / max(shares.decode, 1e-9), shares.pause)
    full = load.decoding + (load.waiting if load.joining is None else load.joining)
    each = rates.decode.at(full) / full  # seconds a token in a full batch
    worth = shares.decode * min(1.0, each * load.decoding / max(step, 1e-9))
    if load.decode_tokens is not None:
        worth = min(worth, shares.prefill * each * load.decode_tokens / rates.prefill.at(load.prefill_tokens))
    return Prediction(
        candidate=candidate,
        shares=shares,
        measured=candidate.kind == "turns" or candidate.label in rates.shares,
        prefill_tok_s=alone_tok_s * shares.prefill,
        step_ms=step * 1e3,
        gap_ms=gap * 1e3,
        worth=shares.prefill + worth,
    )


def _prior(candidate: Candidate, rates: Rates, load: Load) -> Shares:
    """What to expect before measuring: of mixed batches that times add up, which is a gain of 1; else as told."""
    assert rates.prefill is not None and rates.decode is not None
    if candidate.kind != "mixed":
        return candidate.prior
    chunk = max(min(candidate.options["chunk_tokens"] - load.decoding, load.prefill_tokens), 1)
    prefill, step = rates.prefill.each * chunk, rates.decode.at(load.decoding)
    both = max(prefill + step, 1e-9)
    return Shares(prefill / both, step / both)


def _unmeasured(candidates: Sequence[Candidate], rates: Rates, load: Load) -> Decision:
    """Turns measure both phases alone. But while prompts wait all the time, decode would never get its turn."""
    mixed = next((candidate for candidate in candidates if candidate.kind == "mixed"), None)
    missing = " and ".join(n for n in ("prefill", "decode") if getattr(rates, n) is None)
    if mixed and rates.prefill and load.decoding and load.prefill_tokens:
        return Decision(mixed, "decode alone is not measured yet, and prompts wait: mixed batches let both go on", load)
    return Decision(candidates[0], f"{missing} alone is not measured yet, so the phases take turns", load)


def _one_phase(turns: Candidate, load: Load, current: Candidate) -> Decision:
    if not load.decoding and not load.prefill_tokens:
        return Decision(current, "there is nothing to do", load)
    phase = "decode" if load.decoding else "prefill"
    whole = (load.decoding and current.kind == "mixed") or (current.kind == "split" and not current.divides)
    if whole or current.kind == "turns":
        return Decision(current, f"only {phase} has work, and it has the whole device already", load)
    return Decision(turns, f"only {phase} has work, so it gets the whole device", load)


def _best(
    predictions: tuple[Prediction, ...], load: Load, current: Candidate, limit_ms: float | None, short: bool
) -> Decision:
    allowed = [p for p in predictions if p.keeps(limit_ms)]
    running = next((p for p in predictions if p.candidate == current), predictions[0])
    if not allowed:
        assert limit_ms is not None
        best = min(predictions, key=lambda p: p.gap_ms)
        best = running if running.gap_ms <= best.gap_ms * (1 + MARGIN) else best
        reason = (
            f"no choice keeps the gap between two tokens within {limit_ms:.1f} ms, and {best.candidate.label} comes "
            f"closest with {best.gap_ms:.1f} ms"
        )
    elif limit_ms is not None and short:
        best, reason = _soonest(allowed, running, predictions[0], limit_ms)
    else:
        best, reason = _most_worth(allowed, running, predictions[0], limit_ms)
    judged = tuple(replace(p, verdict=_verdict(p, best, allowed, limit_ms)) for p in predictions)
    return Decision(best.candidate, reason, load, judged)


def _soonest(
    allowed: Sequence[Prediction], running: Prediction, turns: Prediction, limit_ms: float
) -> tuple[Prediction, str]:
    """The queue is short: of those within the limit, where its prompts are done first."""
    best = max(allowed, key=lambda p: (p.shares.prefill, p.worth))
    if running in allowed and running.shares.prefill * (1 + MARGIN) >= best.shares.prefill:
        best = running
    return best, (
        f"the queue is short, and {best.candidate.label} has the soonest first token within the limit of "
        f"{limit_ms:.1f} ms between two tokens: prefill at {best.shares.prefill:.2f} of its rate alone, longest gap "
        f"{best.gap_ms:.1f} ms{_stall(turns, allowed)}"
    )


def _stall(turns: Prediction, allowed: Sequence[Prediction]) -> str:
    return "" if turns in allowed else f"; taking turns would stall decode for {turns.gap_ms:.1f} ms"


def _most_worth(
    allowed: Sequence[Prediction], running: Prediction, turns: Prediction, limit_ms: float | None
) -> tuple[Prediction, str]:
    """Most work done for the time, unless another is as good as it, and runs or takes turns."""
    best = max(allowed, key=lambda p: (p.worth, p.shares.prefill))
    within = "" if limit_ms is None else f" within the limit of {limit_ms:.1f} ms between two tokens"
    if best.candidate != running.candidate and running in allowed and best.worth < running.worth * (1 + MARGIN):
        return running, (
            f"{best.candidate.label} promises a worth of {best.worth:.2f}{within}, less than {MARGIN:.0%} above the "
            f"{running.worth:.2f} of what runs now"
        )
    needed = turns.worth * (1.0 if best.candidate == running.candidate else 1 + MARGIN)
    if turns in allowed and best.worth < needed:
        return turns, (
            f"the best overlap{within}, {best.candidate.label}, has a worth of {best.worth:.2f}: "
            f"too little above the 1.00 of taking turns"
        )
    if best.candidate == turns.candidate:
        return turns, f"no overlap{within} is worth more than taking turns"
    return best, (
        f"{best.candidate.label} is worth most{within}: {best.worth:.2f} times taking turns, overlap gain "
        f"{best.shares.gain:.2f}, longest gap {best.gap_ms:.1f} ms{_stall(turns, allowed)}"
    )


def _verdict(one: Prediction, best: Prediction, allowed: Sequence[Prediction], limit_ms: float | None) -> str:
    """Why this one is the choice, or is not."""
    if one.candidate == best.candidate:
        return "this is the choice"
    if one not in allowed and allowed:
        spare = SPARE[one.candidate.kind]
        return f"not chosen, as its gap leaves less than {spare:.0%} of the limit of {limit_ms:g} ms to spare"
    if not allowed:
        return f"not chosen, as its gap is not the shortest by {MARGIN:.0%}"
    return f"not chosen, as it does not promise {MARGIN:.0%} more than {best.candidate.label}"
