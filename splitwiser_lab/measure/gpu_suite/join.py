"""Parts of one bench, measured in several calls, put together: samples side by side, and the verdicts anew.

Only what belongs together: the same machine, versions, commit, dtype, limits and sizes. Rows with the same key must
have been measured at the same rate; their samples are joined.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.measure.document import Document
from splitwiser_lab.measure.gpu_suite.job import Row, summary
from splitwiser_lab.measure.gpu_suite.suite import SCHEMA
from splitwiser_lab.measure.gpu_suite.verdicts import Verdict, verdicts

_SAME = ("schema", "hardware", "versions", "commit", "device", "dtype", "limits")
_MAY_DIFFER = "sweep_fractions"  # of the plan: which rates a call measured
_KEYS = {
    "efficiency": ("phase", "batch", "tokens", "lengths"),
    "overlap": ("load", "mode"),
    "sweep": ("part", "fraction", "mode"),
    "peers": ("peer",),
    "kernels": ("phase", "batch", "tokens", "lengths"),
    "hostbound": ("processes", "sharing", "output"),
}
_IF_ANY = ("limit",)  # a call may have had no time for it
_MUST_AGREE = ("rate", "requests", "prompt", "output")


@dataclass
class Joined(Document):
    """The document of several calls as if it were of one; `joined` in it names them."""

    document: dict[str, Any]

    def verdicts(self) -> list[Verdict]:
        """The figures to reach, judged by all that was measured."""
        return verdicts(self.document)

    def to_dict(self) -> dict[str, Any]:
        """As the suite writes it."""
        return {**self.document, "verdicts": [verdict.to_dict() for verdict in self.verdicts()]}


def join(paths: Sequence[Path]) -> Joined:
    """Join what `bench --suite gpu --json` wrote. Raises WorkloadError for what does not belong together."""
    if len(paths) < 2:
        raise WorkloadError(f"{len(paths)} files to join: give two or more.")
    first, *others = documents = [_read(path) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        _refuse_unlike(str(paths[0]), first, str(path), other)
    joined: dict[str, Any] = {**first, "sections": {}}
    for name in ("shapes", "random_weights"):
        joined[name] = list(dict.fromkeys(shape for document in documents for shape in document[name]))
    joined["repeats"] = max(document["repeats"] for document in documents)
    joined["ceilings"] = next((d["ceilings"] for d in documents if d["ceilings"]), None)
    joined["joined"] = [
        {"file": path.name, **{key: document[key] for key in ("command", "time_utc", "ceilings", "repeats")}}
        for path, document in zip(paths, documents, strict=True)
    ]
    joined["command"] = "; ".join(document["command"] for document in documents)
    for document in documents:
        for section, shapes in document["sections"].items():
            for shape, part in shapes.items():
                into = joined["sections"].setdefault(section, {}).setdefault(shape, {"rows": [], "left_out": []})
                into["left_out"] += part["left_out"]
                for row in part["rows"]:
                    _add(into["rows"], row, _KEYS[section], f"{section}: {shape}")
    return Joined(joined)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError(f"{path} cannot be joined: {error}.") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise WorkloadError(f"{path} was not written by bench --suite gpu --json (schema {SCHEMA}).")
    return found


def _refuse_unlike(path: str, one: dict[str, Any], other_path: str, other: dict[str, Any]) -> None:
    unlike = [name for name in _SAME if one.get(name) != other.get(name)]
    plans = ({k: v for k, v in document["plan"].items() if k != _MAY_DIFFER} for document in (one, other))
    unlike += ["plan"] if next(plans) != next(plans) else []
    if unlike:
        name = unlike[0]
        raise WorkloadError(
            f"{path} and {other_path} differ in {', '.join(unlike)}, so their figures do not belong together: "
            f"{name} is {str(one.get(name))[:200]} here and {str(other.get(name))[:200]} there. Measure both anew."
        )


def _add(rows: list[Row], row: Row, keys: tuple[str, ...], where: str) -> None:
    """Append a row, or its samples to the row of the same key. What one call saw of tokens stays a row of its own."""
    if row.get("part") == "tokens":
        rows.append(row)
        return
    same = next((old for old in rows if all(old.get(key) == row.get(key) for key in keys)), None)
    if same is None:
        rows.append(json.loads(json.dumps(row)))
        return
    for name in _MUST_AGREE:
        if not isinstance(row.get(name), dict) and same.get(name) != row.get(name):
            what = ", ".join(str(row.get(key)) for key in keys)
            raise WorkloadError(
                f"{where}, {what}: {name} is {same.get(name)} in one file and {row.get(name)} in another. Give later "
                "calls the --capacity that the first one measured, so that all have the same rates."
            )
    for name, value in row.items():
        if name in _IF_ANY and same.get(name) is None:
            same[name] = value
        elif isinstance(value, dict) and "samples" in value and same.get(name):
            same[name] = summary([*same[name]["samples"], *value["samples"]])
        elif name == "tokens_as_sequential":
            same[name] = min(same[name], value)
