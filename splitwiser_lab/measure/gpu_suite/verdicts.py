"""The figures to reach on an H200, each beside what was measured: reached, missed, or why there is nothing to judge.

What was missed says what bounds it, as far as that was measured: in which kernels a phase spends its time, and how
far apart each phase alone on its part of the GPU is from the gain.

Works on the suite's document alone, so that recorded results can be judged again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

Row = dict[str, Any]
_ONE_B, _EIGHT_B = "llama-3.2-1b-shape", "llama-3.1-8b-shape"
_SPLIT = ("partitioned", "auto")
_TURNS = ("sequential", "chunked")


@dataclass(frozen=True)
class Verdict:
    """One figure: what to reach, what was measured (with its spread), if that is enough, and else what bounds it."""

    figure: str
    shape: str
    target: str
    measured: str
    reached: bool | None
    bound: str = ""

    @property
    def word(self) -> str:
        """`reached`, `missed`, or `not measured`."""
        return "not measured" if self.reached is None else "reached" if self.reached else "missed"

    def to_dict(self) -> Row:
        """Ready for JSON."""
        return {**self.__dict__, "verdict": self.word}


def verdicts(document: Row) -> list[Verdict]:
    """Every figure to reach, for every shape that the document has."""
    found: list[Verdict] = []
    for shape in document["shapes"]:
        for judge in (_tokens, _prefill, _decode, _gain, _goodput, _at_seventy, _peers):
            found += judge(shape, document)
    return found


def _rows(document: Row, section: str, shape: str, **wanted: Any) -> list[Row]:
    rows = document["sections"].get(section, {}).get(shape, {}).get("rows", [])
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _spread(summary: Row, digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
    low, middle, high = (f"{summary[key] * factor:.{digits}f}{unit}" for key in ("low", "median", "high"))
    return f"{middle} ({low}–{high})"


def _none(figure: str, shape: str, target: str) -> Verdict:
    return Verdict(figure, shape, target, "", None)


def _tokens(shape: str, document: Row) -> Iterator[Verdict]:
    """Whether what the modes wrote can be trusted; where not, they win nothing in the sweep, however fast they are."""
    figure, target = "tokens, read by transformers", "each its own choice, or a near-tie in this dtype"
    rows = _rows(document, "sweep", shape, part="tokens")
    if not rows:
        yield _none(figure, shape, target)
        return
    said = ", ".join(f"{row['mode']} {row['explained'] or 'not looked at'}" for row in rows)
    wrong = [row["mode"] for row in rows if not _all_explained(row)]
    yield Verdict(figure, shape, target, said, not wrong, ", ".join(sorted(wrong)))


def _trusted(document: Row, shape: str) -> set[str]:
    """Modes of the sweep whose texts were read, each token of them explained. Without sequential, none."""
    rows = _rows(document, "sweep", shape, part="tokens")
    modes = {row["mode"] for row in rows if _all_explained(row)}
    return modes if "sequential" in modes else set()


def _all_explained(row: Row) -> bool:
    return bool(row["looked_at"]) and row["explained"] == f"{row['looked_at']} of {row['looked_at']}"


def _rates(document: Row, shape: str, **wanted: Any) -> list[Row]:
    """Rows of the sweep of modes whose tokens can be trusted."""
    trusted = _trusted(document, shape)
    return [row for row in _rows(document, "sweep", shape, part="rate", **wanted) if row["mode"] in trusted]


def _prefill(shape: str, document: Row) -> Iterator[Verdict]:
    figure, least = "prefill 2048: share of the matrix rate", 0.80 if shape == _EIGHT_B else 0.75
    target = f"≥ {least:.0%}"
    rows = _rows(document, "efficiency", shape, phase="prefill")
    if not rows:
        yield _none(figure, shape, target)
    for row in rows:
        yield _phase(figure, target, least, shape, document, row)


def _decode(shape: str, document: Row) -> Iterator[Verdict]:
    """Only the case that a target names: 128@2048 at 8B, 32@1024 else; with ragged lengths."""
    (batch, context), least = ((128, 2048), 0.85) if shape == _EIGHT_B else ((32, 1024), 0.65)
    target = f"≥ {least:.0%}"
    figure = f"decode {batch}@{context}, ragged: share of the read bandwidth"
    rows = _rows(document, "efficiency", shape, phase="decode", lengths="ragged", batch=batch, tokens=context)
    if not rows:
        yield _none(figure, shape, target)
    for row in rows:
        yield _phase(figure, target, least, shape, document, row)


def _phase(figure: str, target: str, least: float, shape: str, document: Row, row: Row) -> Verdict:
    """The verdict on one row of `efficiency`."""
    share = row["share"]
    reached = bool(share["median"] >= least)
    bound = "" if reached else _kernels(shape, document, row)
    return Verdict(figure, shape, target, _spread(share, 0, 100, "%"), reached, bound)


def _kernels(shape: str, document: Row, row: Row) -> str:
    """In which kernels the case of `row` spends its time, and how fast they are; empty where that was not measured."""
    case = {name: row[name] for name in ("phase", "batch", "tokens", "lengths")}
    for found in _rows(document, "kernels", shape, **case):
        whole = found["ms"]["median"]
        said = []
        for kind in ("products", "attention", "rest", "idle"):
            if found[f"{kind}_ms"] is not None:
                share = found.get(f"{kind}_share")
                fast = f" at {share['median']:.0%} of the ceiling" if share else ""
                said.append(f"{kind}{fast}: {found[f'{kind}_ms']['median'] / whole:.0%} of the time")
        slower = whole / found["undisturbed_ms"]["median"]
        return f"{', '.join(said)} (profiled, which takes {slower:.2f}× as long)"
    return ""


def _gain(shape: str, document: Row) -> Iterator[Verdict]:
    least = 1.25 if shape == _EIGHT_B else 1.30
    figure, target = "overlap gain, partitioned or auto, 2048 with 32@1024", f"≥ {least}, decode step ≤ 1.4×"
    rows = _rows(document, "overlap", shape, prefill_tokens=2048, decode_batch=32, context=1024)
    rows = [row for row in rows if row["mode"].startswith(_SPLIT) and row["decode_slowdown"]]
    if not rows:
        yield _none(figure, shape, target)
        return
    gentle = [row for row in rows if row["decode_slowdown"]["median"] <= 1.4]
    best = max(gentle or rows, key=lambda row: float(row["gain"]["median"]))
    slowdown = _spread(best["decode_slowdown"], 2, unit="×")
    measured = f"{_spread(best['gain'])}, step {slowdown}: {best['mode']}"
    reached = bool(gentle) and best["gain"]["median"] >= least
    yield Verdict(figure, shape, target, measured, reached, "" if reached else _at_most(rows, bool(gentle)))


def _at_most(rows: list[Row], gentle: bool) -> str:
    """The limit of each split that has one: both phases alone on their SMs."""
    limits = [f"{row['mode']} {row['limit']['median']:.2f}" for row in rows if row.get("limit")]
    said = [f"at most, each phase alone on its SMs: {', '.join(limits)}"] if limits else []
    return "; ".join(said if gentle else [*said, "no decode step within 1.4×"])


def _by_mode(document: Row, shape: str, value: Callable[[Row], float]) -> dict[str, float]:
    """The best value of each mode over all rates of the sweep."""
    best: dict[str, float] = {}
    for row in _rates(document, shape):
        best[row["mode"]] = max(best.get(row["mode"], 0.0), value(row))
    return best


def _goodput(shape: str, document: Row) -> Iterator[Verdict]:
    limits = document["limits"]
    figure = f"most goodput over the rates, TTFT ≤ {limits['ttft_ms']:g} ms and ITL p99 ≤ {limits['itl_ms']:g} ms"
    target = "≥ 1.3× the better of sequential and chunked"
    best = _by_mode(document, shape, lambda row: float(row["goodput"]["median"]))
    turns = {mode: value for mode, value in best.items() if mode.startswith(_TURNS)}
    split = {mode: value for mode, value in best.items() if not mode.startswith(_TURNS)}
    if not turns or not split or not max(turns.values()):
        yield _none(figure, shape, target)
        return
    mode, rival = max(split, key=lambda m: split[m]), max(turns, key=lambda m: turns[m])
    ratio = split[mode] / turns[rival]
    measured = f"{ratio:.2f}×: {mode} {split[mode]:.2f}/s, {rival} {turns[rival]:.2f}/s"
    yield Verdict(figure, shape, target, measured, ratio >= 1.3, _host(document, shape, (mode, rival)))


def _host(document: Row, shape: str, modes: tuple[str, str]) -> str:
    """How long the device had to wait for the host beside work in these modes: no mechanism, and part of its gaps."""
    idle = _by_mode(document, shape, lambda row: float((row.get("max_idle_ms") or {"high": 0.0})["high"]))
    return "idle beside work, at most: " + ", ".join(f"{mode} {idle[mode]:.0f} ms" for mode in modes)


def _at_seventy(shape: str, document: Row) -> Iterator[Verdict]:
    figure = "at 70 % of sequential's capacity, against sequential"
    target = "ITL p99 ≤ 0.5×, throughput ≥ 0.99×, TTFT p50 ≤ 1.4×"
    rows = _rates(document, shape, fraction=0.7)
    alone = [row for row in rows if row["mode"] == "sequential"]
    others = [row for row in rows if not row["mode"].startswith(_TURNS)]
    if not alone or not others:
        yield _none(figure, shape, target)
    for row in others if alone else ():
        itl, throughput, ttft = (
            _paired(row[name], alone[0][name]) for name in ("p99_itl_ms", "output_throughput", "median_ttft_ms")
        )
        measured = f"{row['mode']}: ITL p99 {itl:.2f}×, throughput {throughput:.2f}×, TTFT p50 {ttft:.2f}×"
        # Throughput of an open loop is that of its arrivals: one part in a hundred is the clock's, not the engine's.
        yield Verdict(figure, shape, target, measured, itl <= 0.5 and throughput >= 0.99 and ttft <= 1.4)


def _paired(ours: Row, theirs: Row) -> float:
    """The median of the ratios round by round, as both ran the same work in each."""
    pairs = zip(ours["samples"], theirs["samples"], strict=False)
    return float(median(a / b for a, b in pairs if b))


def _peers(shape: str, document: Row) -> Iterator[Verdict]:
    if shape == _EIGHT_B:
        return
    for name, least in (("vLLM", 1.0), ("HF generate", 8.0), ("HF generate_batch", 15.0)):
        figure, target = f"output tok/s against {name}", f"≥ {least:g}×"
        rows = [r for r in _rows(document, "peers", shape) if r["peer"] == name or r["peer"].startswith(f"{name} 0")]
        if not rows or not rows[0]["ours_over_theirs"]:
            yield _none(figure, shape, target)
            continue
        ratio = rows[0]["ours_over_theirs"]
        yield Verdict(figure, shape, target, _spread(ratio, 2, unit="×"), ratio["median"] >= least)
