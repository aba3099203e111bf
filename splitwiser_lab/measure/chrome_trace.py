"""A timeline as a Chrome trace: open it in Perfetto (ui.perfetto.dev, which keeps the file on your machine).

Lanes are threads with one slice per batch, requests are async tracks (waiting, prefill, decode), mode
changes are global instants, and what a monitor read are counters. The format: "Trace Event Format", the
JSON that Chrome's about:tracing and Perfetto read; times there are microseconds.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from splitwiser_lab.measure.sources import Sample
from splitwiser_lab.timeline import RequestRecord, Span, Timeline

_LANES, _REQUESTS = 1, 2  # process ids of the two groups of tracks

Event = dict[str, Any]


def chrome_trace(timeline: Timeline, samples: Sequence[Sample] = ()) -> dict[str, Any]:
    """The whole trace, ready for JSON. `samples` are on the timeline's clock, as in a recording."""
    threads = {lane: number for number, lane in enumerate(timeline.lanes, 1)}
    events: list[Event] = [_name("process_name", _LANES, 0, "lanes"), _name("process_name", _REQUESTS, 0, "requests")]
    events += [_name("thread_name", _LANES, number, f"lane {lane}") for lane, number in threads.items()]
    events += [_slice(span, threads[span.lane]) for span in timeline.spans]
    events += [
        {"ph": "i", "s": "g", "name": f"mode {c.mode}", "ts": _us(c.time), "pid": _LANES, "tid": 0, "args": c.options}
        for c in timeline.modes
    ]
    for request in timeline.requests:
        events += _stages(request, timeline.duration)
    for sample in samples:
        events += [
            {"ph": "C", "name": key, "ts": _us(sample.time), "pid": _LANES, "args": {"value": value}}
            for key, value in sample.values.items()
            if value is not None
        ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def save_chrome_trace(timeline: Timeline, path: str | Path, samples: Sequence[Sample] = ()) -> Path:
    """Write the trace to `path`, gzipped when that ends in `.gz` (Perfetto reads both); return the path."""
    path = Path(path)
    data = json.dumps(chrome_trace(timeline, samples)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def _slice(span: Span, thread: int) -> Event:
    tokens = span.prefill_tokens + span.decode_tokens
    args = {
        "prefill_tokens": span.prefill_tokens,
        "decode_tokens": span.decode_tokens,
        "sequences": span.sequences,
        "mode": span.mode,
    }
    return {
        "ph": "X",
        "name": f"{span.phase} {tokens}",
        "cat": span.phase,
        "ts": _us(span.start),
        "dur": _us(span.seconds),
        "pid": _LANES,
        "tid": thread,
        "args": args,
    }


def _stages(request: RequestRecord, end: float) -> Iterator[Event]:
    """Begin and end of the request and of each stage it reached; what never ended ends with the timeline."""
    finished = end if request.finished is None else request.finished
    first = request.token_times[0] if request.token_times else None
    moments = [("waiting", request.arrival), ("prefill", request.scheduled), ("decode", first)]
    reached = [(stage, moment) for stage, moment in moments if moment is not None]
    args = {
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": len(request.token_times),
        "preemptions": request.preemptions,
        "finish_reason": request.finish_reason,
        "error": request.error,
    }
    common = {"cat": "request", "id": request.id, "pid": _REQUESTS, "tid": 0}
    yield {**common, "ph": "b", "name": f"request {request.id}", "ts": _us(request.arrival), "args": args}
    ends = [moment for _, moment in reached[1:]] + [finished]
    for (stage, start), stop in zip(reached, ends, strict=True):
        yield {**common, "ph": "b", "name": stage, "ts": _us(start)}
        yield {**common, "ph": "e", "name": stage, "ts": _us(max(start, stop))}
    if request.hand_off is not None:
        yield {**common, "ph": "n", "name": "hand-off", "ts": _us(request.hand_off)}
    for moment in request.preempted:
        yield {**common, "ph": "n", "name": "preempted", "ts": _us(moment)}
    yield {**common, "ph": "e", "name": f"request {request.id}", "ts": _us(max(request.arrival, finished))}


def _name(kind: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
