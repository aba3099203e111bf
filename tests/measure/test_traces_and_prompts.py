"""Traces are read or refused with reasons, and the project's own prompts are there."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from splitwiser_lab.errors import WorkloadError
from splitwiser_lab.measure import shipped
from splitwiser_lab.measure.prompts import load_prompts
from splitwiser_lab.measure.workload import Workload

CSV = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,55"
)


def lengths(workload: Workload) -> list[tuple[object, int]]:
    return [(arrival.prompt, arrival.max_new_tokens) for arrival in workload.arrivals]


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_a_trace_in_the_original_format_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(CSV.encode()) if name.endswith(".gz") else CSV.encode())
    workload = Workload.from_csv(path)
    assert workload.name == name
    assert [a.arrival_s for a in workload.arrivals] == pytest.approx([0, 4.314579, 4.541877], abs=1e-6)
    assert lengths(workload) == [(374, 44), (396, 109), (879, 55)]
    assert lengths(Workload.from_csv(str(path), requests=2)) == [(374, 44), (396, 109)]


def test_a_trace_may_have_other_columns_and_time_zones(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "GeneratedTokens,Model,ContextTokens,TIMESTAMP\n"
        "5,a,10,2024-05-12 00:00:01+00:00\n\n6,b,20,2024-05-12 00:00:00.500000+00:00\n",
        encoding="utf-8",
    )
    assert [(a.arrival_s, a.prompt) for a in Workload.from_csv(path).arrivals] == [(0, 20), (0.5, 10)]


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:15:46.6805900,374,44\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "wrong columns"),
        ("time,in,out\n1,2,3\n", "'time,in,out'.*must be 'TIMESTAMP,ContextTokens,GeneratedTokens'"),
        (HEADER, "no rows"),
        (HEADER + GOOD + "2023-11-16 18:15:46.6805900,many,44\n", "line 3.*many.*correct the line"),
        (HEADER + GOOD + "2023-11-16 18:15:46.6805900,374\n", "line 3.*374"),
        (HEADER + "yesterday,374,44\n", "line 2.*yesterday"),
        (HEADER + "2023-11-16 18:15:46.6805900,0,44\n", "line 2.*lengths start at 1"),
        (HEADER + "2023-11-16 18:15:46.6805900,374,-1\n", "line 2.*lengths start at 1"),
    ],
)
def test_a_bad_trace_is_refused_with_what_was_seen(tmp_path, content, says):
    path = tmp_path / "trace.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(WorkloadError, match=says):
        Workload.from_csv(path)


def test_an_unreadable_trace_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match=r"nowhere\.csv.*AzurePublicDataset"):
        Workload.from_csv(tmp_path / "nowhere.csv")
    packed = gzip.compress(CSV.encode() * 50)
    for name, content in {
        "cut.csv.gz": packed[: len(packed) // 2],
        "fake.csv.gz": b"text",
        "binary.csv": packed,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WorkloadError, match=name):
            Workload.from_csv(tmp_path / name)


@pytest.mark.parametrize("kind", ["conversation", "code", "summarisation", "radiology"])
def test_there_are_prompts_of_each_kind_short_and_long(kind):
    words = [len(text.split()) for text in load_prompts(kind)]
    assert len(words) >= 8
    assert min(words) < 40
    assert 150 < max(words) < 400


def test_all_prompts_are_distinct_and_radiology_says_that_it_is_invented():
    assert len(set(load_prompts())) == len(load_prompts()) >= 40
    assert all("no real patient" in text for text in load_prompts("radiology"))
    assert len(Workload.closed(load_prompts("code")).requests(100)) == len(load_prompts("code"))


def test_an_unknown_kind_and_a_missing_or_damaged_file_are_explained(tmp_path: Path, monkeypatch):
    with pytest.raises(WorkloadError, match="'poetry'; the kinds are: conversation, code, summarisation, radiology"):
        load_prompts("poetry")
    monkeypatch.setattr(shipped, "PLACES", (tmp_path / "missing", tmp_path))
    with pytest.raises(WorkloadError, match=r"prompts\.json is missing.*reinstall"):
        load_prompts()
    (tmp_path / "prompts.json").write_text('[{"kind": "code"}]', encoding="utf-8")
    with pytest.raises(WorkloadError, match=r"damaged.*text"):
        load_prompts()
    (tmp_path / "prompts.json").write_text(
        '[{"kind": "code", "name": "x", "text": "found in the wheel"}]', encoding="utf-8"
    )
    assert load_prompts() == ["found in the wheel"]
