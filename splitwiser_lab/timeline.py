"""What happened, and when: the spans of the lanes and the records of the requests.

A timeline is plain data. It knows no engine, no clock and no plot; metrics are computed from it and
every picture draws it. All times are seconds since the start of the run, on one clock for all
processes of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Phase = Literal["prefill", "decode"]
SpanPhase = Literal["prefill", "decode", "mixed"]
FinishReason = Literal["stop", "length", "cancelled", "error", "refused", "unfinished"]


@dataclass(frozen=True, slots=True)
class Span:
    """One batch on one lane, as the device (or the core) saw it.

    `sequences` counts the requests in the batch, `prefill_tokens` and `decode_tokens` the tokens that
    went in. A `mixed` span holds both kinds. The last three say what the batch cost (None: not recorded):
    tokens whose keys and values it read or wrote, pairs of a token and one it looked at, tokens it picked.
    """

    lane: str
    phase: SpanPhase
    start: float
    end: float
    prefill_tokens: int
    decode_tokens: int
    sequences: int
    mode: str
    context_tokens: int | None = None
    attended_pairs: int | None = None
    picked: int | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request's life. `token_times[i]` is when its i-th output token reached the engine.

    `hand_off` is when its pages passed from prefill to decode (the last time, if it was preempted);
    `arrival` is when it was due, `scheduled` when its first batch was submitted. `preempted` is each time at which it
    gave its pages back to make room; recordings from before this was kept have the count `preemptions` alone.
    """

    id: int
    prompt_tokens: int
    arrival: float
    token_times: tuple[float, ...] = ()
    scheduled: float | None = None
    hand_off: float | None = None
    finished: float | None = None
    finish_reason: FinishReason = "unfinished"
    preemptions: int = 0
    error: str | None = None
    preempted: tuple[float, ...] = ()

    @property
    def completed(self) -> bool:
        """Whether it ended as asked: by a stop condition or at its length."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, slots=True)
class ModeChange:
    """From `time` on, batches were scheduled under `mode` with these options; `runs` is what mode `auto` chose."""

    time: float
    mode: str
    options: dict[str, Any] = field(default_factory=dict)
    runs: str = ""


@dataclass(frozen=True, slots=True)
class Timeline:
    """A whole run: spans in order of their end, requests in order of submission, mode changes."""

    spans: tuple[Span, ...]
    requests: tuple[RequestRecord, ...]
    modes: tuple[ModeChange, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds from the start of the run to the last thing that happened in it."""
        ends = [span.end for span in self.spans] + [r.finished for r in self.requests if r.finished is not None]
        return max(ends, default=0.0)

    @property
    def lanes(self) -> tuple[str, ...]:
        """Names of the lanes that ran something, in order of first use."""
        return tuple(dict.fromkeys(span.lane for span in sorted(self.spans, key=lambda s: s.start)))

    def to_dict(self) -> dict[str, Any]:
        """The whole timeline as plain lists and dictionaries, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Any) -> Timeline:
        """Read back what `to_dict` gave. Raises ValueError when it is not a timeline."""
        try:
            return cls(
                spans=tuple(Span(**s) for s in raw["spans"]),
                requests=tuple(_request(r) for r in raw["requests"]),
                modes=tuple(ModeChange(**m) for m in raw["modes"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a timeline written by Timeline.to_json: {error!r}") from error

    def to_json(self) -> str:
        """Give the whole timeline as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Read back what `to_json` wrote. Raises ValueError when the text is not a timeline."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"this is not a timeline written by Timeline.to_json: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """Read what `save` wrote. Raises ValueError when the file is not a timeline."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def between(self, start: float, end: float) -> Timeline:
        """The spans that lie wholly inside [start, end]; requests and modes unchanged."""
        inside: Iterable[Span] = (s for s in self.spans if start <= s.start and s.end <= end)
        return Timeline(tuple(inside), self.requests, self.modes)


def _request(raw: Any) -> RequestRecord:
    times = {name: tuple(raw.get(name, ())) for name in ("token_times", "preempted")}
    return RequestRecord(**{**raw, **times})
