"""What a reproduction leaves behind: rows, the ceiling of `split`, files read back, and parts joined into one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitwiser_lab import RecordingError
from splitwiser_lab.cli import app
from splitwiser_lab.measure.reference import TokenCheck
from splitwiser_lab.pipelines.ceiling import Ceiling
from splitwiser_lab.pipelines.document import Reproduction
from splitwiser_lab.pipelines.join import join
from splitwiser_lab.pipelines.phase_figures import PhaseFigures
from splitwiser_lab.pipelines.rows import LeftOut, Row, Work

WORK = Work("tiny", False, "float32", 2, 64, 8, 0)
ORIGIN = {
    "hardware": {"cpu": "a", "cores": 2},
    "versions": {"torch": "2.13"},
    "command": "splitwiser-lab reproduce",
    "commit": "abc",
    "time_utc": "2026-01-01T00:00:00+00:00",
}


def row(name: str, output: int, *rates: float, **figures: float) -> Row:
    mode, _, rest = name.partition(" × ")
    made = Row(name, output, mode, int(rest or 1))
    for rate in rates:
        made.add({"output_throughput": rate, "over_sequential": rate / 10, **figures})
    return made


def part(*rows: Row, **changes: object) -> Reproduction:
    return replace(Reproduction("hf", WORK, rows, {}, ORIGIN), **changes)


# -- rows


def test_a_row_reports_median_spread_and_differences() -> None:
    found = row("split × 2", 12)
    for rate in (10.0, 30.0, 20.0):
        found.add({"output_throughput": rate, "steady_output_throughput": None})
    found.judge([TokenCheck(), TokenCheck(3, 0.5, 0.1), TokenCheck(4, 0.1, 0.5)])
    told = found.to_dict()
    assert told["output_throughput"] == 20.0 and told["spread"]["output_throughput"] == [10.0, 30.0]
    assert not told["tokens_identical"] and len(told["differences"]) == 2 and told["repeats"] == 3
    assert told["unexplained"] == 1, "half precision explains the other"
    assert "steady_output_throughput" not in told, "not measured"
    assert Row.from_dict(told) == found


def test_of_many_differences_the_first_are_described_and_all_without_a_reason() -> None:
    found = row("replicas × 2", 128)
    found.judge([TokenCheck(n, 0.1, 0.5) for n in range(30)] + [TokenCheck(77, 0.9, 0.1)] + [TokenCheck()])
    assert (found.different, found.unexplained, len(found.differences)) == (31, 1, 21)
    assert "token 77" in found.differences[-1] and Row.from_dict(found.to_dict()) == found
    assert part(found).table_rows()[0]["tokens"] == "31 differ"
    old = found.to_dict()
    del old["different"], old["rate"]
    assert Row.from_dict(old).different == 21, "as it was counted in files without it"


def test_a_difference_without_a_reason_is_named_and_ends_the_command(tmp_path: Path) -> None:
    odd = row("split × 2", 12, 10.0)
    odd.judge([TokenCheck(3, 0.5, 0.1)])
    found = part(row("sequential", 12, 10.0), odd)
    assert found.unexplained == ["split × 2"]
    found.to_json(tmp_path / "a.json")
    result = CliRunner().invoke(app, ["reproduce", "--join", str(tmp_path / "a.json")])
    assert result.exit_code != 0 and "split × 2" in str(result.exception) and "1 differ" in result.stdout


# -- the ceiling


@pytest.mark.parametrize(
    ("prefill_s", "decode_s", "processes", "batches", "steady", "run"),
    [
        (4.0, 4.0, 2, 4, 2.0, 8 / 5),
        (1.0, 9.0, 2, 10, 10 / 9, 10 / 9.1),
        (9.0, 1.0, 2, 10, 10 / 9, 10 / 9.1),
        (4.0, 8.0, 3, 4, 3.0, 12 / 6),  # prefill until 4, then the last batch's 2; two decode 2 batches each from 1 on
        (4.0, 12.0, 3, 1, 16 / 6, 1.0),  # a single batch has nothing beside it
    ],
)
def test_the_ceiling(
    prefill_s: float, decode_s: float, processes: int, batches: int, steady: float, run: float
) -> None:
    found = Ceiling(prefill_s, decode_s, processes, batches)
    assert found.steady == pytest.approx(steady) and found.run == pytest.approx(run)


def test_only_split_has_a_ceiling_and_the_notes_tell_it() -> None:
    base = row("sequential", 12, 10.0, prefill_seconds=4.0, decode_seconds=4.0)
    found = part(base, row("replicas × 2", 12, 18.0), row("split × 2", 12, 15.0))
    assert [found.ceiling(each) is not None for each in found.rows] == [False, False, True]
    (note,) = found.notes()
    assert "1.50 × sequential" in note and "gain 2.00 at most, and 1.60 in 4 batches" in note
    assert "replicas × 2 got 1.80" in note and "got more" not in note
    (above,) = part(base, row("split × 2", 12, 17.0)).notes()
    assert "It got more: in its own process a phase was faster" in above and "replicas" not in above
    assert found.to_dict()["rows"][2]["ceiling"]["run"] == pytest.approx(1.6)
    assert not part(row("sequential", 12, 10.0), row("split × 2", 12, 15.0)).notes(), "no times, no ceiling"


# -- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has schema None"),
        ('{"schema": "splitwiser-lab/bench/1"}', "has schema 'splitwiser-lab/bench/1'"),
        ('{"schema": "splitwiser-lab/reproduction/1", "pipeline": "hf"}', "damaged"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(RecordingError, match=message):
        Reproduction.load(tmp_path / "odd.json")


# -- joining


def test_parts_make_one_document(tmp_path: Path) -> None:
    phases = (PhaseFigures("prefill", 2, 64, (0.1,), 100), PhaseFigures("decode", 2, 70, (0.01,), 110))
    a = part(row("sequential", 12, 10.0, 12.0), row("split × 2", 12, 15.0), phases=phases)
    a = replace(a, skipped={"split × 4": "no room", "replicas × 8": "no room"})
    b = part(row("sequential", 12, 11.0), row("split × 4", 12, 30.0), origin={**ORIGIN, "command": "other"})
    c = part(row("sequential", 128, 5.0))
    for name, each in (("a", a), ("b", b), ("c", c)):
        each.to_json(tmp_path / f"{name}.json")
    joins = [word for name in "abc" for word in ("--join", str(tmp_path / f"{name}.json"))]
    result = CliRunner().invoke(app, ["reproduce", *joins, "--json", str(tmp_path / "all.json")])
    assert result.exit_code == 0, result.output
    found = Reproduction.load(tmp_path / "all.json")
    assert [(each.name, each.output) for each in found.rows] == [
        ("sequential", 12),
        ("split × 2", 12),
        ("split × 4", 12),
        ("sequential", 128),
    ]
    assert found.rows[0].samples["output_throughput"] == [10.0, 12.0, 11.0]
    assert found.skipped == {"replicas × 8": "no room"}, "what another part ran was not left out"
    assert "left out: replicas × 8: no room" in result.stdout
    assert found.phases == phases and [piece["command"] for piece in found.parts] == [
        ORIGIN["command"],
        "other",
        ORIGIN["command"],
    ]
    again = join([found, c], ["all", "c"])
    assert len(again.parts) == 4, "a joined document can be joined again"
    assert json.loads((tmp_path / "all.json").read_text())["model"] == "tiny"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"work": replace(WORK, batch=4)}, "work is .*batches of 2.*batches of 4"),
        ({"work": replace(WORK, seed=1)}, "seed is 0 in one, 1 in the other"),
        ({"pipeline": "vllm"}, "pipeline is 'hf' in one, 'vllm'"),
        ({"origin": {**ORIGIN, "hardware": {"cpu": "a", "cores": 4}}}, "hardware, cores is 2 in one, 4"),
        ({"origin": {**ORIGIN, "versions": {"torch": "2.14"}}}, "versions, torch is '2.13'"),
        ({"origin": {**ORIGIN, "commit": "def"}}, "commit is 'abc' in one, 'def'"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecordingError, match=rf"a and b are no parts of one reproduction: {message}"):
        join([part(row("sequential", 12, 1.0)), part(**changes)], ["a", "b"])


# -- what is missing


def test_what_was_left_out_is_written_read_and_told(tmp_path: Path) -> None:
    rows = row("sequential", 12, 10.0, 11.0), row("split × 2", 12, 15.0)
    left = LeftOut("split × 2, 12 new tokens", "no time", 2), LeftOut("split × 2, 128 new tokens", "no time", 2)
    found = part(*rows, left_out=left, skipped={"replicas × 8": "no room"})
    found.to_json(tmp_path / "a.json")
    assert Reproduction.load(tmp_path / "a.json") == found
    assert found.missing() == [
        "left out: replicas × 8: no room",
        "left out after 1 of 2 rounds: split × 2, 12 new tokens: no time",
        "left out: split × 2, 128 new tokens: no time",
    ]
    assert [cells["rounds"] for cells in found.table_rows()] == [2, 1], "rows of one table, unlike in their rounds"
    assert "median of 1–2 interleaved rounds" in str(found.tables()[0].caption)
    assert "rounds" not in part(*rows[:1]).table_rows()[0]
    old = json.loads((tmp_path / "a.json").read_text())
    del old["left_out"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Reproduction.load(tmp_path / "old.json").left_out == ()


def test_what_parts_left_out_stays_unless_another_has_it() -> None:
    def gone(name: str, rounds: int = 2) -> LeftOut:
        return LeftOut(f"{name}, 12 new tokens", "no time", rounds)

    a = part(row("sequential", 12, 1.0, 1.0), row("b", 12, 1.0), left_out=(gone("b"), gone("c"), gone("d")))
    b = part(row("sequential", 12, 1.0), row("b", 12, 2.0), row("c", 12, 1.0), left_out=(gone("c"), gone("e", 3)))
    found = join([a, b], ["a", "b"])
    assert [left.what[0] for left in found.left_out] == ["c", "d", "e"], "of b there are two rounds by now"
    assert join([found, part(row("c", 12, 3.0))], ["all", "more"]).left_out == (gone("d"), gone("e", 3))
    later = row("b", 12, 1.0)
    later.rate = 151.2
    missing = LeftOut("b, 12 new tokens, 151 requests/s", "no time", 1)
    assert join([part(left_out=(missing,)), part(later)], ["a", "b"]).left_out == ()
    assert join([part(left_out=(missing,)), part(row("b", 12, 1.0))], ["a", "b"]).left_out == (missing,)


def test_a_part_that_did_not_come_to_vllm_belongs_to_one_that_did() -> None:
    def with_vllm(version: str) -> Reproduction:
        return part(row("generate", 12, 1.0), origin={**ORIGIN, "versions": {"torch": "2.13", "vllm": version}})

    for versions in (("not run", "0.32.0"), ("0.32.0", "not run")):
        found = join([with_vllm(version) for version in versions], ["a", "b"])
        assert found.origin["versions"] == {"torch": "2.13", "vllm": "0.32.0"}
    with pytest.raises(RecordingError, match="versions, vllm"):
        join([with_vllm("0.31.0"), with_vllm("0.32.0")], ["a", "b"])
