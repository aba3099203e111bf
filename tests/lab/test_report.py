"""The report stands alone, escapes what it is given, and marks without colour alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from splitwiser_lab.lab.report import marks, number, write_report
from splitwiser_lab.timeline import RequestRecord, Span, Timeline

RUN = Timeline(
    (
        Span("main", "prefill", 0.0, 0.1, 64, 0, 1, "sequential"),
        Span("main", "decode", 0.1, 0.2, 0, 1, 1, "sequential"),
    ),
    (RequestRecord(0, 64, 0.0, (0.1, 0.2), 0.0, 0.1, 0.2, "length"),),
)
ROWS = [
    {"mode": "sequential", "ITL max (ms)": 997.25, "output tok/s": 67.71, "completed": 1024, "tokens identical": True},
    {"mode": "chunked", "ITL max (ms)": 110.2, "output tok/s": 69.4, "completed": 1024, "tokens identical": False},
    {"mode": "processes", "ITL max (ms)": None, "output tok/s": 59.5, "completed": 1024, "tokens identical": True},
]
HARDWARE = {
    "device": "2 cores, no GPU",
    "versions": {"torch": "2.13.0", "python": "3.11.7"},
    "command": "splitwiser-lab demo",
    "commit": "3f2a9c1",
}
TEXTS = [
    {
        "prompt": "<script>alert('hi')</script> & more",
        "text": "An <img src=x onerror=alert(1)> answer",
        "identical": {"sequential": True, "chunked": False, "processes": None, "mps": "top two logits 0.002 apart"},
        "texts": {"chunked": "Another <b>answer</b>"},
    }
]


def write(path: Path, **changes: Any) -> str:
    given: dict[str, Any] = {"hardware": HARDWARE, "rows": ROWS, "timelines": {"sequential": RUN}, "texts": TEXTS}
    given |= {"title": "Modes <compared>", "notes": ["chunked loses <here>"]} | changes
    return write_report(path / "deep" / "report.html", **given).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags that were opened and never closed, and every attribute that could fetch something."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_one_well_formed_file_that_fetches_nothing(tmp_path: Path) -> None:
    page = write(tmp_path)
    outline = Outline(page)
    assert outline.open == []
    assert outline.fetched == ["data:,"]
    assert not outline.tags & {"script", "img", "iframe", "object"}
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in page
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>1</script>"
    page = write(
        tmp_path,
        hardware={evil: evil, "versions": {evil: evil}},
        rows=[{"mode": evil, evil: evil}],
        timelines={evil: RUN},
        texts=[
            *TEXTS,
            {"prompt": evil * 50, "text": evil, "identical": {evil: evil}, "texts": {evil: "other " + evil}},
        ],
    )
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(&#x27;hi&#x27;)&lt;/script&gt; &amp; more" in page
    assert "Modes &lt;compared&gt;" in page
    assert "chunked loses &lt;here&gt;" in page
    assert Outline(page).open == []


def test_it_shows_hardware_versions_command_and_commit(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert "2 cores, no GPU" in page
    assert "torch 2.13.0 · python 3.11.7" in page
    assert "<code>splitwiser-lab demo</code>" in page
    assert "<code>3f2a9c1</code>" in page


def test_the_table_formats_figures_and_says_best_in_words(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert '<th scope="row">sequential</th>' in page
    assert '<td class="number">110 <small class="best">best</small></td>' in page
    assert '<td class="number">69.4 <small class="best">best</small></td>' in page
    assert '<td class="number">59.5 <small class="worst">worst</small></td>' in page
    assert "n/a" in page
    assert page.count('<td class="number">1,024</td>') == 3
    assert '<td class="number">yes</td>' in page
    assert "ITL: the gap between two tokens" in page
    assert "Overlap gain:" not in page  # no such column here


def test_each_mode_says_whether_its_tokens_are_identical(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert "<b>✓ sequential</b> identical tokens" in page
    assert "<b>✗ chunked</b> tokens differ" in page
    assert "<b>– processes</b> not compared" in page
    assert "<b>≈ mps</b> top two logits 0.002 apart" in page
    assert "Another &lt;b&gt;answer&lt;/b&gt;" in page


def test_a_long_prompt_is_folded_but_whole(tmp_path: Path) -> None:
    prompt = "word " * 400
    page = write(tmp_path, texts=[{"prompt": prompt, "text": "t", "identical": {}}])
    assert "(2,000 characters)" in page
    assert f"<pre>{prompt}</pre>" in page


def test_what_is_absent_leaves_no_empty_section(tmp_path: Path) -> None:
    page = write(tmp_path, hardware={}, rows=[], timelines={}, texts=[], notes=[])
    assert "<section>" not in page
    assert "<h1>Modes &lt;compared&gt;</h1>" in page


def test_the_gantt_is_inside(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert page.count("<svg ") == 1
    assert page.count("<rect ") == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((None, "n/a"), (True, "yes"), (False, "no"), (12345, "12,345"), ("12 ± 1", "12 ± 1")),
        *((0.0, "0"), (0.012345, "0.0123"), (0.5, "0.5"), (1.5, "1.50"), (12.34, "12.3"), (1234.5, "1,234")),
        (-3.14159, "-3.14"),
    ],
)
def test_numbers_read_well(value: Any, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("output_throughput", [1.0, 2.0, 3.0], ["worst", "", "best"]),
        ("p99_itl_ms", [1.0, 2.0, 3.0], ["best", "", "worst"]),
        ("E2EL p99 (ms)", [5, 2], ["", "best"]),
        ("overlap gain", [1.0, None, 1.4, "n/a"], ["", "", "best", ""]),
        ("p99_itl_ms", [1.001, 1.002], ["", ""]),
        ("completed", [8, 8, 8], ["", "", ""]),
        ("prompt tokens", [1, 2, 3], ["", "", ""]),
        ("goodput", [2.0], [""]),
        ("output tok/s", [3.0, 3.0, 1.0], ["best", "best", "worst"]),
        ("tokens identical", [True, False], ["", ""]),
    ],
)
def test_best_and_worst_follow_the_meaning_of_the_column(column: str, values: list[Any], expected: list[str]) -> None:
    assert marks(column, values) == expected
