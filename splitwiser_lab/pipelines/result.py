"""What a run of a pipeline gives back: an engine's Result, and what the splitting itself cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from splitwiser_lab.engine.request import Request
from splitwiser_lab.engine.result import Result
from splitwiser_lab.metrics import overlap_seconds
from splitwiser_lab.pipelines.messages import Done, Prefilled, Released, Report
from splitwiser_lab.pipelines.phases import PromptBatch, Step
from splitwiser_lab.timeline import ModeChange, Phase, Span, Timeline


@dataclass(frozen=True)
class HandOff:
    """One batch's way from prefill to decode: bytes, seconds to write them, seconds until decode took them up."""

    batch: int
    nbytes: int
    write_s: float
    wait_s: float


@dataclass(frozen=True)
class SteadyState:
    """The window in which every process had work, and the rates in it; seconds since the start of the run.

    A request counts by its slower phase: `request_throughput` is the lower of first tokens per second and of decoded
    tokens per second over those that a request has on average, and `output_throughput` is that times the tokens of a
    request. So prompts that were prefilled ahead, and wait at the end of the window for decode, are not output, and
    what decode takes from a store that was filled before the window does not make up for prefill.
    """

    start: float
    end: float
    output_throughput: float
    request_throughput: float


@dataclass(frozen=True)
class PipelineResult(Result):
    """Result of a pipeline: as an engine's, with its costs apart from the figures.

    `spawn_s` are the seconds until each process was ready, counted from the start of the first (empty
    when they ran already); they, and loading the model, lie outside the timeline. Hand-offs lie inside.
    Spans are host times, from the call of the model to its tokens on the host: host gaps included.
    """

    placement: str = ""
    spawn_s: tuple[float, ...] = ()
    hand_offs: tuple[HandOff, ...] = ()
    padding: int = 0

    @property
    def steady(self) -> SteadyState | None:
        """None when fewer than two batches went through both phases while every process had work."""
        spans = self.timeline.spans
        lanes = [[span for span in spans if span.lane == lane] for lane in self.timeline.lanes]
        start = max(min(span.start for span in lane) for lane in lanes)
        end = min(max(span.end for span in lane) for lane in lanes)
        begun = [request.token_times for request in self.timeline.requests if request.token_times]
        first = sum(start < times[0] <= end for times in begun)
        decoded = sum(start < t <= end for times in begun for t in times[1:])
        each = sum(len(times) - 1 for times in begun) / len(begun)  # tokens that decode writes for a request
        both = min(first, decoded / each) if each else first
        batch = max(Counter(times[0] for times in begun).values())  # prompts that were prefilled together
        if end <= start or both < 2 * batch:
            return None
        return SteadyState(start, end, both * (1 + each) / (end - start), both / (end - start))

    def figures(self) -> dict[str, float | None]:
        """All figures of the run, flat, ready for JSON: metrics under the names of `vllm bench serve`, then our own."""
        steady, hand_offs = self.steady, self.hand_offs
        return {
            **self.metrics.to_dict(),
            "steady_output_throughput": steady.output_throughput if steady else None,
            "steady_seconds": steady.end - steady.start if steady else None,
            "overlap_seconds": overlap_seconds(self.timeline),
            "prefill_seconds": self.metrics.phase_seconds["prefill"],
            "decode_seconds": self.metrics.phase_seconds["decode"],
            "spawn_s": max(self.spawn_s, default=None),
            "hand_off_write_ms": 1e3 * median(h.write_s for h in hand_offs) if hand_offs else None,
            "hand_off_wait_ms": 1e3 * median(h.wait_s for h in hand_offs) if hand_offs else None,
            "hand_off_bytes": float(median(h.nbytes for h in hand_offs)) if hand_offs else None,
        }


@dataclass
class Progress:
    """Folds the reports of workers into requests, spans and hand-offs while a run goes on."""

    batches: dict[int, list[Request]]
    mode: str
    origin: float
    nbytes: dict[int, int] = field(default_factory=dict)  # of each batch's keys and values between the phases
    spans: list[Span] = field(default_factory=list)
    hand_offs: list[HandOff] = field(default_factory=list)
    _written: dict[int, tuple[float, float]] = field(default_factory=dict)

    def listen(self, worker: str, batch: PromptBatch, report: Report) -> None:
        """Take one report of a worker about its batch."""
        if isinstance(report, Prefilled):
            for request in self.batches[batch.number]:
                request.scheduled = report.step.start
            self._fold(worker, "prefill", batch, report.step)
            if report.written:
                self._written[batch.number] = report.written
        elif isinstance(report, Done):
            for step in report.steps:
                self._fold(worker, "decode", batch, step)
            if report.steps and batch.number in self._written:
                self._hand_over(batch, report.steps[0].start)
        else:
            assert isinstance(report, Released)

    def _fold(self, worker: str, phase: Phase, batch: PromptBatch, step: Step) -> None:
        rows = [(r, t) for r, t in zip(self.batches[batch.number], step.tokens, strict=True) if t is not None]
        prompts = sum(len(request.prompt) for request, _ in rows) if phase == "prefill" else 0
        decoded = len(rows) if phase == "decode" else 0
        start, end = step.start - self.origin, step.end - self.origin
        self.spans.append(Span(worker, phase, start, end, prompts, decoded, len(rows), self.mode))
        for request, token in rows:
            request.output.append(token)
            request.token_times.append(step.end)
            if token in request.sampling.stop_token_ids:
                request.finish("stop", step.end)
            elif len(request.output) == request.sampling.max_new_tokens:
                request.finish("length", step.end)

    def _hand_over(self, batch: PromptBatch, taken: float) -> None:
        begun, ended = self._written[batch.number]
        self.hand_offs.append(HandOff(batch.number, self.nbytes[batch.number], ended - begun, taken - ended))
        for request in self.batches[batch.number]:
            request.hand_off = ended

    def timeline(self, requests: Sequence[Request], options: dict[str, Any]) -> Timeline:
        """All that happened, on a clock that starts with the run."""
        spans = tuple(sorted(self.spans, key=lambda span: span.end))
        records = tuple(request.record(self.origin) for request in requests)
        return Timeline(spans, records, (ModeChange(0.0, self.mode, options),))
