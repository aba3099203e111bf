"""The figures to reach, judged on rows made by hand: what counts, against whom, and whose tokens can be trusted."""

from __future__ import annotations

from typing import Any

import pytest

from splitwiser_lab.measure.gpu_suite.job import summary
from splitwiser_lab.measure.gpu_suite.plan import ChatLimits
from splitwiser_lab.measure.gpu_suite.sweep import goodput
from splitwiser_lab.measure.gpu_suite.verdicts import verdicts
from splitwiser_lab.timeline import RequestRecord, Span, Timeline


class TestVerdicts:
    def judge(self, section: str, rows: list[dict[str, Any]], shape: str = "llama-3.2-1b-shape") -> dict[str, Any]:
        document = {
            "shapes": [shape],
            "limits": {"ttft_ms": 500.0, "itl_ms": 30.0},
            "sections": {section: {shape: {"rows": rows, "left_out": []}}},
        }
        return {verdict.figure: verdict for verdict in verdicts(document)}

    def value(self, *samples: float) -> dict[str, Any]:
        return summary(list(samples))

    def row(self, mode: str, goodput: float, itl: float = 10, ttft: float = 100, tok_s: float = 1000) -> dict[str, Any]:
        names = {"goodput": goodput, "p99_itl_ms": itl, "median_ttft_ms": ttft, "output_throughput": tok_s}
        values = {name: self.value(value) for name, value in names.items()}
        return {"part": "rate", "fraction": 0.7, "mode": mode, **values}

    def tokens(self, mode: str, explained: str = "4 of 4") -> dict[str, Any]:
        looked_at = int(explained.split()[-1]) if explained else 0
        return {"part": "tokens", "mode": mode, "differ": 9, "looked_at": looked_at, "explained": explained}

    def test_nothing_measured_is_no_verdict(self) -> None:
        assert {verdict.word for verdict in self.judge("peers", []).values()} == {"not measured"}

    def test_a_mode_whose_tokens_are_not_explained_wins_nothing(self) -> None:
        others = ("streams", "mps", "processes")
        rates = [self.row("sequential", 1.0, itl=40), *(self.row(mode, 2.0) for mode in others)]
        said = [self.tokens("sequential"), self.tokens("streams")]
        name, good = "tokens, read by transformers", "most goodput over the rates, TTFT ≤ 500 ms"
        found = self.judge("sweep", [*rates, *said, self.tokens("mps", "3 of 4"), self.tokens("processes", "")])
        assert found[name].reached is False and found[name].bound == "mps, processes"
        assert found[name].measured == "sequential 4 of 4, streams 4 of 4, mps 3 of 4, processes not looked at"
        assert any(figure.startswith(good) and "streams 2.00/s" in v.measured for figure, v in found.items())
        assert not any(v.measured.startswith(("mps:", "processes:")) for v in found.values())
        assert self.judge("sweep", [*rates, *said])[name].reached is True

        def winners(rows: list[dict[str, Any]]) -> list[bool | None]:
            return [v.reached for figure, v in self.judge("sweep", rows).items() if figure.startswith(good)]

        assert winners([*rates, *said]) == [True]
        assert winners(rates) == [None], "nobody read them"
        assert winners([*rates, self.tokens("sequential", "3 of 4"), self.tokens("streams")]) == [None]

    def test_the_gain_counts_only_with_a_gentle_decode(self) -> None:
        load = {"prefill_tokens": 2048, "decode_batch": 32, "context": 1024}

        def row(mode: str, gain: float, slowdown: float) -> dict[str, Any]:
            return {**load, "mode": mode, "gain": self.value(gain), "decode_slowdown": self.value(slowdown)}

        rough, gentle = row("partitioned:decode_sms=32", 1.5, 2.0), row("partitioned:decode_sms=64", 1.31, 1.3)
        streams = row("streams", 1.9, 1.0)
        name = "overlap gain, partitioned or auto, 2048 with 32@1024"
        assert self.judge("overlap", [rough, gentle, streams])[name].reached is True
        assert "decode_sms=64" in self.judge("overlap", [rough, gentle, streams])[name].measured
        assert self.judge("overlap", [rough, streams])[name].reached is False
        assert self.judge("overlap", [gentle], "llama-3.1-8b-shape")[name].target.startswith("≥ 1.25")

    def test_a_missed_gain_says_what_each_split_could_reach(self) -> None:
        load = {"prefill_tokens": 2048, "decode_batch": 32, "context": 1024}
        split = {**load, "mode": "partitioned:decode_sms=64", "gain": self.value(1.2), "limit": self.value(1.31)}
        auto = {**load, "mode": "auto", "gain": self.value(1.21), "limit": None, "decode_slowdown": self.value(1.5)}
        name = "overlap gain, partitioned or auto, 2048 with 32@1024"
        rough = self.judge("overlap", [{**split, "decode_slowdown": self.value(1.6)}, auto])[name]
        assert rough.reached is False
        assert "alone on its SMs: partitioned:decode_sms=64 1.31; no decode step within 1.4×" in rough.bound
        gentle = self.judge("overlap", [{**split, "decode_slowdown": self.value(1.3)}, auto])[name]
        assert gentle.bound.endswith("decode_sms=64 1.31")
        reached = {**split, "gain": self.value(1.3), "decode_slowdown": self.value(1.3)}
        assert self.judge("overlap", [reached])[name].bound == ""

    def test_a_missed_phase_says_where_its_time_goes(self) -> None:
        case = {"phase": "decode", "batch": 32, "tokens": 1024, "lengths": "ragged"}
        times = {"ms": 2.0, "undisturbed_ms": 1.6, "products_ms": 1.2, "attention_ms": 0.4, "rest_ms": 0.3}
        shares = {"products_share": 0.88, "attention_share": 0.6}
        kernels = {**case, **{name: self.value(value) for name, value in (times | shares).items()}}
        kernels["idle_ms"] = self.value(0.1)
        shape = "llama-3.2-1b-shape"

        def judge(share: float, *rows: Any) -> Any:
            sections = {"efficiency": [{**case, "share": self.value(share)}], "kernels": list(rows)}
            document = {
                "shapes": [shape],
                "limits": {"ttft_ms": 500.0, "itl_ms": 30.0},
                "sections": {name: {shape: {"rows": rows, "left_out": []}} for name, rows in sections.items()},
            }
            return next(verdict for verdict in verdicts(document) if verdict.figure.startswith("decode 32@1024"))

        assert judge(0.57, {**kernels, "lengths": "equal"}, kernels).bound == (
            "products at 88% of the ceiling: 60% of the time, attention at 60% of the ceiling: 20% of the time, "
            "rest: 15% of the time, idle: 5% of the time (profiled, which takes 1.25× as long)"
        )
        assert judge(0.57).bound == "" and judge(0.7, kernels).bound == ""
        assert "idle" not in judge(0.57, {**kernels, "idle_ms": None}).bound

    def test_goodput_is_judged_against_the_better_of_both_rivals(self) -> None:
        rows = [self.row("sequential", 4), self.row("chunked", 10), self.row("auto:itl_limit_ms=30", 12)]
        rows += [self.tokens(row["mode"]) for row in rows]
        [found] = [v for name, v in self.judge("sweep", rows).items() if name.startswith("most goodput")]
        assert found.reached is False and found.measured.startswith("1.20×: auto")

    def test_at_seventy_percent_all_three_conditions_count(self) -> None:
        alone = self.row("sequential", 4, itl=20, ttft=100)
        good = self.row("auto:itl_limit_ms=30", 4, itl=9, ttft=120)
        slow = self.row("auto:itl_limit_ms=30", 4, itl=9, ttft=190)
        name = "at 70 % of sequential's capacity, against sequential"
        read = [self.tokens("sequential"), self.tokens("auto:itl_limit_ms=30")]
        assert self.judge("sweep", [alone, good, *read])[name].reached is True
        assert self.judge("sweep", [alone, slow, *read])[name].reached is False

    def test_a_peer_is_found_under_its_version(self) -> None:
        rows = [{"peer": "vLLM 0.24.0", "ours_over_theirs": self.value(1.1, 0.9, 1.05)}]
        assert self.judge("peers", rows)["output tok/s against vLLM"].word == "reached"


def test_goodput_keeps_both_limits_of_each_request() -> None:
    def request(number: int, first: float, gaps: list[float]) -> RequestRecord:
        times = [first]
        for gap in gaps:
            times.append(times[-1] + gap)
        return RequestRecord(number, 10, 0.0, tuple(times), 0.0, first, times[-1], "length")

    requests = (
        request(0, 0.1, [0.01] * 50),
        request(1, 0.6, [0.01] * 50),  # the first token comes late
        request(2, 0.1, [0.01] * 10 + [0.2]),  # one gap of eleven is long: above the 99th percentile
        request(3, 0.1, []),
        RequestRecord(4, 10, 0.0),
    )
    timeline = Timeline((Span("main", "decode", 0.0, 2.0, 0, 1, 1, "sequential"),), requests)
    assert goodput(timeline, ChatLimits(500, 30)) == pytest.approx(2 / 2.0)
    assert goodput(timeline, ChatLimits(500, 1000)) == pytest.approx(3 / 2.0)
