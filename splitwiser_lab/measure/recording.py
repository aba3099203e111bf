"""A recorded run: what happened, on which machine, from which command. Loads into the classes of a live run.

The file is JSON (`*.json`, or gzipped `*.json.gz`), at most 2 MB, so that other tools can read it:

    schema, model, random_weights, dtype, device, kv_tokens, page_size, mode, options, workload,
    tokens_identical (null: not compared), tokens_against, hardware, versions, command, commit, time_utc,
    metrics   the figures under the names of `vllm bench serve`; `Recording.load` computes them anew
    timeline  modes, requests and spans, as `Timeline.to_dict` gives them
    watched   what a monitor watched: {"key", "label", "unit", "ceiling", "source", "reason" (why it is N/A)}
    samples   what it read: {"time": s, "values": {key: number or null}}

Times are seconds since the start of the run, to the microsecond.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitwiser_lab.errors import RecordingError
from splitwiser_lab.measure import shipped
from splitwiser_lab.measure.mode_spec import ModeSpec
from splitwiser_lab.measure.monitor import Monitor
from splitwiser_lab.measure.provenance import provenance
from splitwiser_lab.measure.sources import Metric, Sample
from splitwiser_lab.metrics import Metrics
from splitwiser_lab.timeline import Timeline

if TYPE_CHECKING:
    from splitwiser_lab.engine.engine import Engine
    from splitwiser_lab.engine.result import Result
    from splitwiser_lab.measure.workload import Workload

SCHEMA = "splitwiser-lab/recording/1"
MOST_BYTES = 2_000_000
_FAMILY = SCHEMA.rpartition("/")[0] + "/"
_PARTS = ("timeline", "watched", "samples")  # what is more than a value
_DIGITS = 6  # of seconds: a microsecond is finer than any clock here


@dataclass(frozen=True)
class Recording:
    """One run, with all that is needed to draw it again and to judge it."""

    timeline: Timeline
    model: str
    random_weights: bool
    dtype: str
    device: str
    kv_tokens: int
    page_size: int
    mode: str
    options: dict[str, Any]
    workload: dict[str, Any]
    tokens_identical: bool | None
    tokens_against: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    command: str
    commit: str
    time_utc: str
    watched: tuple[Metric, ...] = field(default=(), repr=False)
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        result: Result,
        engine: Engine,
        workload: Workload | dict[str, Any],
        *,
        tokens_identical: bool | None = None,
        tokens_against: str = "",
        monitor: Monitor | None = None,
        origin: dict[str, Any] | None = None,
    ) -> Recording:
        """Record a run of `engine`. The mode is the one in which the run began.

        `tokens_identical` says whether every token equals those of `tokens_against` (None: nobody compared).
        `monitor` watched meanwhile: its samples of this run's time are kept, on the run's clock. `origin` is a
        `provenance()` taken before; None takes it now. Raises RecordingError when the timeline tells no mode or
        the pool is gone (a closed engine).
        """
        if not result.timeline.modes:
            raise RecordingError("this run's timeline names no mode: record the result of generate or serve.")
        if not hasattr(engine, "pool"):
            raise RecordingError("the engine is closed: record its runs before closing it.")
        begun = result.timeline.modes[0]
        return cls(
            timeline=Timeline.from_dict(_rounded(result.timeline.to_dict())),
            model=Path(engine.model.name).name if Path(engine.model.name).is_absolute() else engine.model.name,
            random_weights=engine.model.random_weights,
            dtype=str(engine.dtype).removeprefix("torch."),
            device=str(engine.device),
            kv_tokens=engine.pool.tokens,
            page_size=engine.pool.page_size,
            mode=begun.mode,
            options=dict(begun.options),
            workload=workload if isinstance(workload, dict) else workload.describe(),
            tokens_identical=tokens_identical,
            tokens_against=tokens_against,
            watched=() if monitor is None else monitor.metrics,
            samples=() if monitor is None else _samples_of(monitor, result),
            **(provenance(engine.device) if origin is None else origin),
        )

    @cached_property
    def metrics(self) -> Metrics:
        """Latencies, throughputs and goodput, computed from the timeline as for a live run."""
        return Metrics.of(self.timeline)

    @property
    def label(self) -> str:
        """The mode with its options, e.g. `partitioned (decode_sms=64)`."""
        return ModeSpec(self.mode, dict(self.options)).label

    @property
    def machine(self) -> str:
        """The device's name, e.g. `NVIDIA H200`."""
        return str(self.hardware.get("device_name", self.device))

    @property
    def work(self) -> str:
        """What was done where: equal for two recordings of the same work on the same machine, different else."""
        weights = ", random weights" if self.random_weights else ""
        asked = self.workload
        tokens = " → ".join(
            "?" if asked.get(f"{side}_tokens_p50") is None else f"{asked[f'{side}_tokens_p50']:.0f}"
            for side in ("input", "output")
        )
        rate = f", {asked['requests_per_s']:.3g}/s" if asked.get("requests_per_s") else ""
        return (
            f"{self.model} ({self.dtype}{weights}): {asked.get('name', 'workload')}, {len(self.timeline.requests)} "
            f"requests of {tokens} tokens (p50){rate}, on {self.machine}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _PARTS}
        return {
            "schema": SCHEMA,
            **plain,
            "metrics": self.metrics.to_dict(),
            "timeline": self.timeline.to_dict(),
            "watched": [asdict(metric) for metric in self.watched],
            "samples": [asdict(sample) for sample in self.samples],
        }

    @classmethod
    def from_dict(cls, raw: Any) -> Recording:
        """Read back what `to_dict` gave. Raises RecordingError for what is not a recording of this format."""
        _check_schema(raw)
        try:
            own = {f.name: raw[f.name] for f in fields(cls) if f.name not in _PARTS}
            watched = tuple(Metric(**metric) for metric in raw["watched"])
            samples = tuple(Sample(float(s["time"]), dict(s["values"])) for s in raw["samples"])
            recording = cls(timeline=Timeline.from_dict(raw["timeline"]), watched=watched, samples=samples, **own)
            _ = recording.metrics  # a timeline whose times are no numbers fails here, not in the middle of a plot
        except KeyError as error:
            raise RecordingError(f"it has no entry {error}: the file is damaged, get it again.") from error
        except (TypeError, ValueError, IndexError) as error:
            raise RecordingError(f"it is damaged ({error}): get it again.") from error
        return recording

    def save(self, path: str | Path) -> Path:
        """Write it to `path`, gzipped when that ends in `.gz`; return the path.

        Raises RecordingError for another ending than `.json` or `.json.gz`, and above 2 MB.
        """
        path = _checked_name(Path(path))
        data = json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if path.suffix == ".gz":
            data = gzip.compress(data, mtime=0)  # the same run, the same bytes
        if len(data) > MOST_BYTES:
            raise RecordingError(
                f"{path.name} would have {len(data) / 1e6:.1f} MB, and a recording has at most {MOST_BYTES / 1e6:.0f}: "
                "record fewer requests, fewer samples, or with the ending .json.gz."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what `save` wrote. Raises RecordingError when it is missing, damaged or of an unknown format."""
        try:
            return cls.from_dict(_read(_checked_name(Path(path))))
        except RecordingError as error:
            raise RecordingError(f"{Path(path).name}: {error}") from error


def recordings(folder: str | Path) -> list[Recording]:
    """All recordings in a folder, by file name. `folder` is a path, or the name of a shipped set such as `cpu`.

    Other documents of this package in it (a bench, a comparison) are passed over. Raises RecordingError when
    there is no such folder, no recording in it, or a damaged file.
    """
    where = Path(folder) if Path(folder).is_dir() else shipped.find(f"recordings/{folder}")
    if where is None or not where.is_dir():
        raise RecordingError(f"no folder {str(folder)!r} and no shipped set of recordings of that name.")
    found = []
    for path in sorted(p for p in where.iterdir() if p.name.endswith((".json", ".json.gz"))):
        try:
            raw = _read(path)
            if not _is_other_document(raw):
                found.append(Recording.from_dict(raw))
        except RecordingError as error:
            raise RecordingError(f"{path.name}: {error}") from error
    if not found:
        raise RecordingError(f"{where.name!r} holds no recordings: make some with `splitwiser-lab record --out`.")
    return found


def by_work(recorded: Sequence[Recording]) -> dict[str, dict[str, Recording]]:
    """Recordings of the same work on the same machine, by label: `work` -> `label` -> recording (the latest)."""
    grouped: dict[str, dict[str, Recording]] = {}
    for recording in sorted(recorded, key=lambda r: r.time_utc):
        grouped.setdefault(recording.work, {})[recording.label] = recording
    return grouped


def _read(path: Path) -> Any:
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except FileNotFoundError:
        raise RecordingError("there is no such file.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordingError(f"it cannot be read ({error}): the file is cut off or damaged, get it again.") from error


def _checked_name(path: Path) -> Path:
    if not path.name.endswith((".json", ".json.gz")):
        raise RecordingError(f"{path.name!r} is no name for a recording: end it in .json or .json.gz.")
    return path


def _is_other_document(raw: Any) -> bool:
    schema = str(raw.get("schema", "")) if isinstance(raw, dict) else ""
    return schema.startswith("splitwiser-lab/") and not schema.startswith(_FAMILY)


def _check_schema(raw: Any) -> None:
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(schema, str) or not schema.startswith(_FAMILY):
        raise RecordingError(f"it is no recording: its schema is {schema!r}, and a recording's is {SCHEMA!r}.")
    if schema != SCHEMA:
        raise RecordingError(f"it is of schema {schema!r}, and this version reads {SCHEMA!r}: update splitwiser-lab.")


def _samples_of(monitor: Monitor, result: Result) -> tuple[Sample, ...]:
    """What was read during the run, on its clock; readings to five digits, finer than any sensor."""
    if not result.requests:
        return ()
    start = result.requests[0].arrival - result.timeline.requests[0].arrival  # of the run, on the monitor's clock
    inside = (s for s in monitor.samples if 0 <= s.time - start <= result.timeline.duration)
    return tuple(
        Sample(round(s.time - start, _DIGITS), {k: _shortened(v) for k, v in s.values.items()}) for s in inside
    )


def _shortened(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _rounded(value: Any) -> Any:
    """The same structure with all floats rounded to the microsecond."""
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
