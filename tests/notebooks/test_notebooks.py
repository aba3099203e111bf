"""Every notebook keeps the house rules as committed, and runs top to bottom in a fresh kernel."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import psutil
import pytest

from splitwiser_lab.lab.execute import execute
from splitwiser_lab.lab.exercises import EXERCISES
from splitwiser_lab.lab.setup import REPOSITORY, badge
from splitwiser_lab.model.fetch import cache_dir

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MODEL = "smollm2-135m"

MOST_BYTES = 300_000
MOST_SECONDS = 180
MOST_LINES = 18  # of a code cell
# An absolute folder of a Unix or Windows machine; an address (https://...) or a relative path is none.
OWN_FOLDER = re.compile(r"(?<![\w./:~>])/(?:root|home|Users|work|tmp|opt|usr|var|mnt)/\w|\b[A-Z]:\\\w")
WIDGETS = "application/vnd.jupyter.widget"
ALLOWED_FORMS = {"image/svg+xml", "image/png", "text/plain", "text/html", "text/markdown"}

Notebook = dict[str, Any]
each = pytest.mark.parametrize("notebook", PATHS, ids=lambda path: path.stem, indirect=True)


@pytest.fixture
def notebook(request: pytest.FixtureRequest) -> Notebook:
    return nbformat.read(request.param, as_version=4)


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Path:
    return request.node.callspec.params["notebook"]


def code(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: Notebook) -> list[Notebook]:
    return [output for cell in code(notebook) for output in cell["outputs"]]


def svgs(notebook: Notebook) -> list[str]:
    return [
        output["data"]["image/svg+xml"] for output in outputs(notebook) if "image/svg+xml" in output.get("data", {})
    ]


def test_there_are_notebooks():
    assert {"00_quickstart", "01_prefill_vs_decode", "02_split_pipeline", "05_batching_and_paging"} <= {
        path.stem for path in PATHS
    }


@each
class TestForm:
    def test_is_well_formed_and_small(self, notebook: Notebook, path: Path):
        nbformat.validate(notebook)
        assert path.stat().st_size < MOST_BYTES

    def test_the_first_cell_has_title_sentence_badge_and_time(self, notebook: Notebook, path: Path):
        first = notebook["cells"][0]
        assert first["cell_type"] == "markdown"
        title, sentence, link, duration = [part for part in first["source"].split("\n\n") if part.strip()]
        assert title.startswith("# ")
        assert sentence.endswith(".")
        assert link == badge(path.name)
        assert "CPU" in duration and "GPU" in duration and "minute" in duration

    def test_the_second_cell_sets_up_and_names_the_repository_of_the_package(self, notebook: Notebook):
        second = notebook["cells"][1]
        assert second["cell_type"] == "code"
        assert "lab.setup()" in second["source"]
        assert f"git+{REPOSITORY}\n" in second["source"]

    def test_cells_are_short(self, notebook: Notebook):
        long = {cell["id"]: len(cell["source"].splitlines()) for cell in code(notebook)}
        assert max(long.values()) <= MOST_LINES, long

    def test_definitions_live_in_the_package(self, notebook: Notebook):
        assert not [cell["id"] for cell in code(notebook) if re.search(r"^\s*(def|class) ", cell["source"], re.M)]

    def test_every_guess_comes_before_a_measurement_and_shares_its_picture(self, notebook: Notebook):
        cells = code(notebook)
        guesses = [i for i, cell in enumerate(cells) if cell["source"].startswith("my_guess = ")]
        assert len(guesses) >= 2
        for i in guesses:
            assert "lab.reveal(my_guess" in cells[i + 1]["source"]
            assert any("your guess" in output["data"]["image/svg+xml"] for output in pictures(cells[i + 1]))

    def test_at_least_three_exercises_end_it_with_folded_answers_and_checks(self, notebook: Notebook):
        text = [cell["source"] for cell in notebook["cells"]]
        start = next(i for i, source in enumerate(text) if source.startswith("## Exercises"))
        checks = [i for i in range(start, len(text)) if text[i].startswith("answer = None")]
        assert len(checks) >= 3
        for i in checks:
            name = re.search(r'lab\.check\("([^"]+)"', text[i])
            assert name and name[1] in EXERCISES
            assert text[i + 1].startswith("<details><summary>Answer</summary>\n\n")
            assert text[i + 1].endswith("</details>")
            assert notebook["cells"][i]["outputs"][0]["text"].startswith("Not answered yet")

    def test_links_lead_somewhere(self, notebook: Notebook):
        markdown = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        relative = [target for target in re.findall(r"\]\(([^)]+)\)", markdown) if "://" not in target]
        assert not [target for target in relative if not (FOLDER / target).is_file()]


@each
class TestOutputs:
    def test_ran_once_from_top_to_bottom(self, notebook: Notebook):
        assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))

    def test_has_no_error_and_no_warning(self, notebook: Notebook):
        assert not [output for output in outputs(notebook) if output["output_type"] == "error"]
        assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]

    def test_has_no_widget_state_and_no_metadata_of_a_machine(self, notebook: Notebook):
        assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert not [cell["id"] for cell in notebook["cells"] if set(cell["metadata"]) - {"tags"}]
        assert WIDGETS not in json.dumps(notebook)

    def test_outputs_are_static(self, notebook: Notebook):
        forms = {form for output in outputs(notebook) for form in output.get("data", {})}
        assert forms <= ALLOWED_FORMS
        assert "<script" not in json.dumps(notebook)
        assert len(svgs(notebook)) >= 3

    def test_pictures_are_well_formed_and_say_what_they_show(self, notebook: Notebook):
        for svg in svgs(notebook):
            root = ElementTree.fromstring(svg)
            assert root.find("{http://www.w3.org/2000/svg}desc") is not None

    def test_names_the_machine_that_made_them_but_not_its_folders_and_people(self, notebook: Notebook):
        assert "\nmachine " in code(notebook)[0]["outputs"][0]["text"]
        text = json.dumps(notebook)
        assert not OWN_FOLDER.findall(text)
        names = {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4}
        assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]

    def test_answered_every_assertion(self, notebook: Notebook):
        assert any("assert " in cell["source"] and cell["execution_count"] for cell in code(notebook))


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (cache_dir() / "models" / MODEL / "complete").is_file(), reason=f"{MODEL} is not in the cache")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs_in_a_fresh_kernel(path: Path, tmp_path: Path):
    """As the command does that makes the committed outputs, on a copy."""
    copy = Path(shutil.copy(path, tmp_path))
    before = nbformat.read(path, as_version=4)
    quiet, start = is_quiet(), time.monotonic()
    execute(copy)
    took = time.monotonic() - start
    after = nbformat.read(copy, as_version=4)
    assert [cell["source"] for cell in after["cells"]] == [cell["source"] for cell in before["cells"]]
    for new, old in zip(code(after), code(before), strict=True):
        assert len(new["outputs"]) == len(old["outputs"]), (
            f"{new['source']}\n{json.dumps(new['outputs'], indent=1)[:4000]}"
        )
    # Beside other work two cores take several times as long, which says nothing about the notebook.
    assert took < MOST_SECONDS or not (quiet and is_quiet()), f"{path.name} took {took:.0f} s"


def is_quiet() -> bool:
    return psutil.cpu_percent(interval=1) < 25


def pictures(cell: Notebook) -> list[Notebook]:
    return [output for output in cell["outputs"] if "image/svg+xml" in output.get("data", {})]
