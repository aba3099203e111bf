"""What notebooks call: pictures in every form, guesses beside measurements, checks, tables, the pool by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import nbformat
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from splitwiser_lab import Engine, lab
from splitwiser_lab.lab import display
from splitwiser_lab.lab.by_hand import Recording, cached, fingerprint, message_bytes
from splitwiser_lab.lab.execute import execute, relink, scrub
from splitwiser_lab.lab.exercises import EXERCISES, equal
from splitwiser_lab.lab.guesses import as_number, verdict
from splitwiser_lab.lab.palette import PHASE_COLOURS
from splitwiser_lab.lab.setup import REPOSITORY, badge
from splitwiser_lab.lab.static_bars import bars_svg
from splitwiser_lab.lanes.steps import decode_one_token, prefill
from splitwiser_lab.timeline import RequestRecord, Span, Timeline

SVG = "{http://www.w3.org/2000/svg}"
RUN = Timeline((Span("main", "prefill", 0.0, 0.2, 9, 0, 1, "sequential"),), (RequestRecord(0, 9, 0.0, (0.2,)),))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The outputs a notebook would get, in static form."""
    bundles: list[dict[str, Any]] = []
    monkeypatch.setattr(display, "publish", bundles.append)
    monkeypatch.setattr("splitwiser_lab.lab.tables.publish", bundles.append)
    monkeypatch.setenv("SPLITWISER_LAB_STATIC", "1")
    return bundles


class TestShow:
    def test_a_timeline_is_a_picture_with_a_text_beside(self, shown):
        lab.show(RUN, "alone")
        assert set(shown[0]) == {"image/svg+xml", "text/plain"}
        assert "alone: 200 ms, prefill 100%" in shown[0]["text/plain"]

    def test_a_live_front_end_gets_the_interactive_figure_and_the_static_picture(self, shown, monkeypatch):
        monkeypatch.setenv("SPLITWISER_LAB_STATIC", "0")
        lab.show({"sequential": RUN})
        assert set(shown[0]) == {"image/svg+xml", "text/plain", "application/vnd.plotly.v1+json"}

    def test_colab_gets_html(self, shown, monkeypatch):
        monkeypatch.setenv("SPLITWISER_LAB_STATIC", "0")
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
        lab.show({"sequential": RUN})
        assert {"image/svg+xml", "text/html"} <= set(shown[0])
        assert len(shown[0]["text/html"]) < 100_000, "plotly's script belongs on the network, not in the notebook"

    def test_svg_text_and_figures(self, shown):
        lab.show("<svg><title>A &lt; B</title></svg>")
        lab.show(go.Figure())
        assert shown[0]["text/plain"] == "A < B"
        assert set(shown[1]) == {"text/plain"} and "interactive figure" in shown[1]["text/plain"]

    @pytest.mark.parametrize("thing", [3, {}, {"a": 1}, None])
    def test_anything_else_is_refused(self, shown, thing):
        with pytest.raises(TypeError, match="give a Timeline"):
            lab.show(thing)

    def test_outside_a_notebook_the_text_is_printed(self, capsys):
        lab.show({"sequential": RUN})
        assert "sequential: 200 ms" in capsys.readouterr().out


class TestGuesses:
    def test_guess_and_measurement_share_a_picture(self, shown):
        lab.reveal(3, {"decode": 20.0, "prefill": 600.0}, "tok/s", "Rates")
        root = ElementTree.fromstring(shown[0]["image/svg+xml"])
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert texts[:7] == ["Rates", "your guess", "3 tok/s", "decode", "20 tok/s", "prefill", "600 tok/s"]
        assert [r.get("fill") for r in root.iter(f"{SVG}rect")][1:] == [
            PHASE_COLOURS["decode"],
            PHASE_COLOURS["prefill"],
        ]
        assert texts[-1] == "What was measured is 200 times your guess."

    def test_the_value_that_was_guessed_can_be_named(self, shown):
        lab.reveal(20, {"a": 20.0, "b": 1.0}, "ms", of="a")
        assert "within 10 %" in shown[0]["text/plain"]

    @pytest.mark.parametrize("guess", [None, "many", float("nan"), -1, ...])
    def test_what_is_no_number_is_no_guess(self, shown, guess):
        lab.reveal(guess, {"a": 2.0}, "ms")
        assert "No guess yet" in shown[0]["text/plain"] and "your guess" not in shown[0]["text/plain"]

    def test_what_is_predicted_is_hollow_beside_what_was_measured(self):
        root = ElementTree.fromstring(bars_svg({"a, predicted": 10.0, "a, measured": 5.0}, "ms"))
        predicted, measured = root.iter("{http://www.w3.org/2000/svg}rect")
        assert predicted.get("fill") == measured.get("fill")
        assert float(predicted.get("fill-opacity", 1)) < 0.5 and measured.get("fill-opacity") is None

    def test_bars_are_as_long_as_their_values(self):
        root = ElementTree.fromstring(bars_svg({"a": 10.0, "b": 5.0, "c": 0.0}, "ms"))
        long, half, none = (float(rect.get("width") or 0) for rect in root.iter(f"{SVG}rect"))
        assert half == pytest.approx(long / 2, abs=0.1) and none == 1

    def test_labels_are_escaped(self):
        ElementTree.fromstring(bars_svg({"<a> & b": 1.0}, "<ms>", "a < b", 2.0, "c & d"))

    def test_nothing_to_draw_is_refused(self, shown):
        for draw in (lambda: lab.reveal(1, {}, "ms"), lambda: bars_svg({}, "ms")):
            with pytest.raises(ValueError, match="give"):
                draw()

    @pytest.mark.parametrize(
        ("guess", "value", "said"),
        [
            (100.0, 95.0, "within 10 %"),
            (0.0, 0.0, "within 10 %"),
            (1.0, 4.0, "4.0 times your guess"),
            (50.0, 5.0, "10 times smaller"),
            (3.0, 0.0, "You guessed 3 ms, and 0 ms was measured"),
            (0.0, 3.0, "You guessed 0 ms"),
        ],
    )
    def test_verdicts(self, guess, value, said):
        assert said in verdict(guess, value, "ms")

    def test_numbers(self):
        assert as_number("2.5") == 2.5 and as_number(True) == 1.0 and as_number([1]) is None


class TestChecks:
    def test_not_answered_yet_is_no_error(self, capsys):
        for name in EXERCISES:
            lab.check(name, None)
        assert capsys.readouterr().out.count("Not answered yet") == len(EXERCISES)

    @pytest.mark.parametrize(
        ("name", "right", "wrong", "given"),
        [
            ("split: where it lies", [9, 6.0], (2, 6), ()),
            ("split: the journey", 128, 131, ()),
            ("split: swapped pages", " Same ", "different", ()),
            ("quickstart: eight at once", 7.9, 9, ()),
            ("quickstart: eight at once", 1.3, 1, ()),
            ("quickstart: tokens per step", 24.1, 30, ({"tokens_per_s": 500.0}, {"ms": 50.0})),
        ],
    )
    def test_right_and_wrong(self, capsys, name, right, wrong, given):
        lab.check(name, right, *given)
        assert capsys.readouterr().out.startswith("✓ Right. ")
        for answer in (wrong, "no idea", object(), []):
            lab.check(name, answer, *given)
            assert capsys.readouterr().out == f"✗ Not yet. {EXERCISES[name].hint}\n"

    def test_the_first_to_finish_is_the_shortest(self):
        runs = [
            SimpleNamespace(mode=m, figures=lambda s=s: {"duration": s})
            for m, s in (("sequential", 6.1), ("chunked", 6.0))
        ]
        assert EXERCISES["quickstart: first to finish"].solution(SimpleNamespace(runs=runs)) == "chunked"

    def test_an_unknown_exercise_is_a_mistake_of_the_notebook(self):
        with pytest.raises(KeyError):
            lab.check("no such", 1)

    def test_equality(self):
        assert equal("128.0", 128.0) and not equal("", 128.0) and not equal("12", (1, 2)) and equal(1, True)


class TestTable:
    def test_columns_without_figures_are_left_out(self, shown):
        lab.table([{"mode": "a", "gain": "n/a", "ms": 1.5}, {"mode": "<b>", "gain": "n/a", "ms": None}])
        assert shown[0]["text/plain"].splitlines() == ["mode  ms", "a     1.50", "<b>   n/a"]
        assert "<th>&lt;b&gt;</th>" in shown[0]["text/html"] and "gain" not in shown[0]["text/html"]

    def test_ranges_stay_whole_and_text_is_read_from_the_left(self, shown):
        reason = "this system offers no counter of it"
        lab.table([{"mode": "a", "ms": "3 (2.5–1,000.5)", "why": reason}, {"mode": "b", "ms": "4", "why": ""}])
        html = shown[0]["text/html"]
        assert "<td>3<br>(2.5\u2060–\u20601,000.5)</td>" in html
        assert f'<td style="text-align:left">{reason}</td>' in html and '<th style="text-align:left">why</th>' in html

    def test_no_rows_are_refused(self):
        with pytest.raises(ValueError, match="no row"):
            lab.table([])


class TestByHand:
    def test_the_rows_of_a_request_follow_its_block_table(self, engine: Engine):
        lane = engine.new_lane("inline", "by hand")
        prefill(lane, list(range(20)), [5, 3, 9]).result()
        rows, data = cached(engine.pool, [5, 3, 9], 20), engine.pool.data
        assert rows.shape == (*data.shape[:2], 20, *data.shape[4:])
        assert rows[:, :, 11].equal(data[:, :, 3, 3])  # pages of 8 tokens: position 11 is row 3 of the second page

    def test_decoding_leaves_the_prompt_as_it_was_and_one_bit_would_show(self, engine: Engine):
        lane, table = engine.new_lane("inline", "by hand"), [5, 3, 9]
        first = prefill(lane, list(range(20)), table).result().tokens[0]
        assert first is not None
        before, longer = fingerprint(engine.pool, table, 20), fingerprint(engine.pool, table, 21)
        decode_one_token(lane, first, 20, table).result()
        assert fingerprint(engine.pool, table, 20) == before
        assert fingerprint(engine.pool, table, 21) != longer
        engine.pool.data[0, 0, 5, 0, 0, 0] += 1
        assert fingerprint(engine.pool, table, 20) != before

    def test_swapping_full_pages_changes_nothing_and_swapping_the_last_one_does(self, engine: Engine):
        """What the third exercise of the split pipeline claims."""
        lane, prompt = engine.new_lane("inline", "by hand"), list(range(20))
        tokens = {}
        for name, table in (("as is", [5, 3, 9]), ("full", [3, 5, 9]), ("last", [9, 3, 5])):
            tokens[name] = [prefill(lane, prompt, [5, 3, 9]).result().tokens[0]]
            while len(tokens[name]) < 4:
                position = len(prompt) + len(tokens[name]) - 1
                step = decode_one_token(lane, tokens[name][-1], position, table)
                tokens[name].append(step.result().tokens[0])
        assert tokens["as is"] == tokens["full"] != tokens["last"]

    def test_a_step_is_a_small_message_however_long_the_prompt(self):
        assert message_bytes(7, 10, [1]) < message_bytes(7, 4000, list(range(125))) < 1500

    def test_a_recording_is_a_timeline(self, engine: Engine):
        lane, recording = engine.new_lane("inline", "by hand"), Recording()
        first = recording.add("prefill", prefill(lane, list(range(20)), [5, 3, 9]).result(), 20)
        recording.add("decode", decode_one_token(lane, first, 20, [5, 3, 9]).result())
        prefilled, decoded = recording.timeline.spans
        assert (prefilled.lane, prefilled.start, prefilled.prefill_tokens) == ("prefill", 0.0, 20)
        assert (decoded.lane, decoded.decode_tokens) == ("decode", 1)
        assert 0 < prefilled.end <= decoded.start < decoded.end
        assert Recording().timeline == Timeline((), ())


class TestExecute:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        old = "[![Open In Colab](https://x/badge.svg)](https://old/place.ipynb)"
        cells = [
            new_markdown_cell(f"# Title\n\n{old}"),
            new_code_cell(
                "# %pip install git+https://old/place\nimport os\nprint(os.getcwd(), os.path.expanduser('~/x'))"
            ),
            new_code_cell("os.environ['SPLITWISER_LAB_STATIC']", metadata={"tags": ["kept"], "collapsed": True}),
        ]
        notebook = new_notebook(
            cells=cells, metadata={"widgets": {"state": {}}, "kernelspec": {"name": "mine", "display_name": "Mine"}}
        )
        nbformat.write(notebook, tmp_path / "a.ipynb")
        return tmp_path / "a.ipynb"

    @pytest.mark.slow
    def test_runs_and_leaves_no_trace_of_the_machine(self, path: Path):
        execute(path)
        notebook = nbformat.read(path, as_version=4)
        assert notebook.cells[0].source == f"# Title\n\n{badge('a.ipynb')}"
        assert f"git+{REPOSITORY}\n" in notebook.cells[1].source
        assert str(path.parent.parent) not in path.read_text(encoding="utf-8")
        assert notebook.cells[1].outputs[0].text.endswith("~/x\n")
        assert notebook.cells[2].outputs[0].data["text/plain"] == "'1'"
        assert [dict(cell.metadata) for cell in notebook.cells] == [{}, {}, {"tags": ["kept"]}]
        assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata

    @pytest.mark.slow
    def test_a_notebook_that_raises_is_left_as_it_was(self, path: Path):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.append(new_code_cell("1 / 0"))
        nbformat.write(notebook, path)
        before = path.read_bytes()
        with pytest.raises(Exception, match="ZeroDivisionError"):
            execute(path)
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]

    def test_pieces_of_a_stream_are_one_output(self, path: Path):
        notebook = nbformat.read(path, as_version=4)
        names = ["stdout", "stdout", "stderr", "stdout"]
        made = [nbformat.v4.new_output("stream", name=name, text=f"{n}\n") for n, name in enumerate(names)]
        made.insert(2, nbformat.v4.new_output("display_data", data={"text/plain": "a picture"}))
        cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
        cell.outputs = made
        scrub(notebook, path.parent)
        told = [(o.get("name"), o.get("text")) for o in cell.outputs]
        assert told == [("stdout", "0\n1\n"), (None, None), ("stderr", "2\n"), ("stdout", "3\n")]

    def test_widgets_are_scrubbed(self, path: Path):
        notebook = nbformat.read(path, as_version=4)
        widget = {
            "output_type": "display_data",
            "data": {"application/vnd.jupyter.widget-view+json": {}},
            "metadata": {},
        }
        notebook.cells[1].outputs = [nbformat.from_dict(widget)]
        scrub(notebook, path.parent)
        assert notebook.cells[1].outputs == []

    def test_relinking_twice_changes_nothing(self, path: Path):
        notebook = nbformat.read(path, as_version=4)
        relink(notebook, "a.ipynb")
        once = [cell.source for cell in notebook.cells]
        relink(notebook, "a.ipynb")
        assert [cell.source for cell in notebook.cells] == once
