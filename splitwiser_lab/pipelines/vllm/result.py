"""What engines said of their steps, as requests, spans and hand-offs under this package's names.

vLLM's request metrics give when a request was scheduled and when its first and last token came; tokens between
them have the end of their engine's step. On a GPU, where an engine's core is a process of its own and ahead of the
one that tells of its steps, all tokens have the end of the step that told of them. vLLM says nothing of the prompt
tokens in a step: whole prompts are counted to the step of their first token, those that were cut into chunks to the
steps from their scheduling to their first token, as far as the budget of a step goes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from splitwiser_lab.engine.request import Request
from splitwiser_lab.pipelines.result import HandOff, PipelineResult
from splitwiser_lab.pipelines.vllm.dispatch import Step
from splitwiser_lab.pipelines.vllm.placement import VllmPlacement
from splitwiser_lab.pipelines.vllm.team import EngineFacts
from splitwiser_lab.timeline import ModeChange, Span, SpanPhase, Timeline


@dataclass(frozen=True)
class VllmHandOff(HandOff):
    """One request's way; `load_s` seconds to read them, `tokens` found, and those that decode computed again."""

    load_s: float = 0.0
    tokens: int = 0
    recomputed: int = 0


@dataclass(frozen=True)
class VllmResult(PipelineResult):
    """Result of vLLM engines: as a pipeline's, with vLLM's version and the tokens that each KV cache holds."""

    engines: tuple[EngineFacts, ...] = ()

    def figures(self) -> dict[str, float | None]:
        """All figures of the run, flat, ready for JSON."""
        hand_offs = [h for h in self.hand_offs if isinstance(h, VllmHandOff)]
        return {
            **super().figures(),
            "hand_off_load_ms": 1e3 * median(h.load_s for h in hand_offs) if hand_offs else None,
            "recomputed_tokens": float(sum(h.recomputed for h in hand_offs)) if hand_offs else None,
            "preemptions": float(sum(request.preemptions for request in self.timeline.requests)),
            "kv_tokens": float(sum(engine.kv_tokens for engine in self.engines)),
        }


@dataclass
class _Lane:
    """The steps of one engine."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    prompts: list[tuple[float, int, int]] = field(default_factory=list)  # scheduled, step of first token, tokens

    def prefilled(self, budget: int | None) -> list[tuple[int, int]]:
        """Prompt tokens, and requests they belong to, of each step: first come, first served within `budget`."""
        tokens, requests = [0] * len(self.ends), [0] * len(self.ends)
        for scheduled, last, left in sorted(self.prompts):
            first = last if budget is None else max(0, bisect_right(self.starts, scheduled) - 1)
            for step in range(min(last, first), last + 1):
                room = left if budget is None or step == last else budget - self.decoded[step] - tokens[step]
                taken = max(0, min(left, room))
                tokens[step] += taken
                requests[step] += taken > 0
                left -= taken
        return list(zip(tokens, requests, strict=True))


@dataclass
class _Moved:
    """A request's way from prefill to decode: when its first token was there and when decode took it up."""

    written: float
    scheduled: float | None = None
    cached: int = 0
    recomputed: int = 0


class Progress:
    """Folds the steps of engines into requests, spans and hand-offs while a run goes on."""

    def __init__(self, requests: Sequence[Request], placement: VllmPlacement) -> None:
        self._requests, self._placement = requests, placement
        self._mode = placement.mode
        self._parts = {role.name: role.part for role in placement.roles}
        self._lanes = {role.name: _Lane() for role in placement.roles}
        self._first_steps: dict[tuple[str, int], int] = {}
        self._moved: dict[int, _Moved] = {}

    def listen(self, engine: str, step: Step) -> None:
        """Take one step of an engine."""
        lane, number = self._lanes[engine], len(self._lanes[engine].ends)
        new = [int(name) for name, _ in step["tokens"] if (engine, int(name)) not in self._first_steps]
        self._first_steps.update({(engine, index): number for index in new})
        lane.starts.append(step["start"])
        lane.ends.append(step["end"])
        decoding = self._parts[engine] == "decode"
        lane.decoded.append(len(step["tokens"]) - (0 if decoding else len(new)))
        for name, tokens in step["tokens"]:
            request = self._requests[int(name)]
            request.output += tokens
            request.token_times += [step["end"]] * len(tokens)
        for index in new:
            self._moved.setdefault(index, _Moved(step["end"]))  # by the first of its engines
        for end in step["finished"]:
            self._end(engine, lane, end)

    def _end(self, engine: str, lane: _Lane, end: dict[str, Any]) -> None:
        index, part = int(end["id"]), self._parts[engine]
        request = self._requests[index]
        cached, known = end["cached"], len(request.prompt)
        lane.prompts.append((end["scheduled"], self._first_steps[engine, index], known - cached))
        request.preemptions += end["preemptions"]
        if part == "decode":
            if end["first"] is not None:
                request.token_times[1], request.token_times[-1] = end["first"], end["last"]
            moved = self._moved[index]
            request.hand_off = moved.written
            moved.scheduled, moved.cached, moved.recomputed = end["scheduled"], cached, known - cached
        else:
            request.scheduled = end["scheduled"]
            if end["first"] is not None:
                request.token_times[0], request.token_times[-1] = end["first"], end["last"]
        if part != "prefill" or end["reason"] == "stop" or request.sampling.max_new_tokens == 1:
            request.finish(end["reason"], request.token_times[-1])

    def hand_offs(self, told: Sequence[Sequence[Any]]) -> tuple[VllmHandOff, ...]:
        """What was handed over, request by request; `told` are the engines' `[what, bytes, seconds, request]`."""
        noted = {(what, int(name)): (nbytes, seconds) for what, nbytes, seconds, name in told}
        found = []
        for index, moved in sorted(self._moved.items()):
            if moved.scheduled is None:  # its first token was its last
                continue
            (nbytes, write_s), (_, load_s) = (noted.get((what, index), (0, 0.0)) for what in ("save", "load"))
            waited = max(0.0, moved.scheduled - moved.written)
            found.append(VllmHandOff(index, nbytes, write_s, waited, load_s, moved.cached, moved.recomputed))
        return tuple(found)

    def timeline(self, origin: float, options: dict[str, Any]) -> Timeline:
        """All that happened, on a clock that starts with the run."""
        spans = [span for name, lane in self._lanes.items() for span in self._spans(name, lane, origin)]
        records = tuple(request.record(origin) for request in self._requests)
        modes = (ModeChange(0.0, self._mode, options),)
        return Timeline(tuple(sorted(spans, key=lambda span: span.end)), records, modes)

    def _spans(self, name: str, lane: _Lane, origin: float) -> list[Span]:
        spans = []
        prefilled = lane.prefilled(self._placement.chunk_tokens)
        for start, end, decoded, (tokens, prompts) in zip(lane.starts, lane.ends, lane.decoded, prefilled, strict=True):
            if tokens or decoded:
                phase: SpanPhase = "mixed" if tokens and decoded else "prefill" if tokens else "decode"
                among = decoded + (prompts if self._parts[name] != "decode" else 0)
                times = (start - origin, end - origin)
                spans.append(Span(name, phase, *times, tokens, decoded, among, self._mode))
        return spans
