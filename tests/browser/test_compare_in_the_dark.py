"""lab.profile and lab.compare in JupyterLab, dark theme: figures can be read, and measurements are drawn over them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import nbformat
import pytest
from jupyter import ROOT, Notebook, browser, server, why_not
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
CELLS = (
    "from splitwiser_lab import lab\nimport splitwiser_lab as sl\nhere = lab.setup()",
    "lab.show({mode: run.timeline for mode, run in list(lab.recorded().items())[:2]})",
    'engine = sl.Engine.from_pretrained("smollm2-135m", kv_tokens=2048)',
    "found = lab.profile(engine, (32,), (1,), repeats=1)",
    'lab.compare(engine, ["sequential", "chunked"], repeats=1, prompt_tokens=64, output_tokens=8, rate=4, requests=2)',
)
READABLE = 7.0  # WCAG's enhanced contrast


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = new_notebook(cells=[new_code_cell(source) for source in CELLS], metadata={"kernelspec": kernel})
    nbformat.write(made, folder / "compare.ipynb")
    with server(folder, home, "JupyterLab Dark") as address, browser() as page:
        opened = Notebook(page, address, "compare.ipynb")
        opened.run_all()
        page.wait_for_selector("svg.bars", timeout=60_000)
        yield opened


def bars(notebook: Notebook) -> str:
    return str(notebook.page.locator("svg.bars").text_content())


@pytest.mark.parametrize(
    ("text", "behind"),
    [(".js-plotly-plot .ytick text", ".js-plotly-plot .main-svg"), ("svg.bars text", "svg.bars .page")],
    ids=["plotly", "svg"],
)
def test_figures_are_readable_in_the_dark_theme(notebook: Notebook, text: str, behind: str) -> None:
    find = """([text, behind]) => {
        const page = getComputedStyle(document.querySelector(behind))
        const paper = page.backgroundColor === 'rgba(0, 0, 0, 0)' ? page.fill : page.backgroundColor
        const ink = getComputedStyle(document.querySelector(text)).fill
        return [getComputedStyle(document.body).backgroundColor, ink, paper]
    }"""
    notebook.page.wait_for_selector(text)
    theme, ink, paper = notebook.page.evaluate(find, [text, behind])
    assert luminance(theme) < 0.2, f"this is no dark theme: {theme}"
    assert contrast(ink, paper) >= READABLE, f"{ink} on {paper}"


def test_what_was_measured_is_drawn_over_the_prediction(notebook: Notebook) -> None:
    legend = notebook.page.locator(".js-plotly-plot .legendtext").all_text_contents()
    assert {"prefill, predicted", "prefill, measured", "decode, predicted", "decode, measured"} <= set(legend)


def test_a_slider_changes_the_prediction_and_the_button_measures_it(notebook: Notebook) -> None:
    before = bars(notebook)
    assert "64 tokens in" in before and "predicted" in before and ", measured" not in before
    slider = notebook.page.locator(".widget-inline-hbox:has-text('prompt') .noUi-handle")
    slider.focus()
    slider.press("ArrowRight")
    notebook.page.wait_for_selector("svg.bars:has-text('128 tokens in')", timeout=30_000)
    assert times(bars(notebook)) != times(before)
    notebook.page.click("button:has-text('Measure')")
    notebook.page.wait_for_selector("svg.bars:has-text('sequential, measured')", timeout=180_000)
    after = bars(notebook)
    assert "chunked, measured" in after and "tokens identical in all modes" in after
    notebook.page.locator(".jp-OutputArea-output:has(svg.bars)").last.screenshot(
        path=str(ROOT / "reports" / "browser" / "compare.png")
    )
    assert notebook.errors == []


def times(said: str) -> list[str]:
    return re.findall(r"[\d,.]+ ms", said)


def luminance(colour: str) -> float:
    values = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
