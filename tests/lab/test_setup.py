"""The set-up call: what it prints, how it decides on pictures, what it would install on Colab."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from typing import Any

import pytest

from splitwiser_lab import lab
from splitwiser_lab.errors import SplitwiserError
from splitwiser_lab.hardware import Choice
from splitwiser_lab.lab import display
from splitwiser_lab.lab.display import choose_pictures
from splitwiser_lab.lab.setup import REPOSITORY, Here, badge, in_colab, install, missing_requirements

SIGNS = ("SPLITWISER_LAB_STATIC", "COLAB_RELEASE_TAG", "JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD")


@pytest.fixture(autouse=True)
def no_sign_of_a_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in SIGNS:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "in_kernel", lambda: True)


def completed(code: int, stderr: str = "") -> Any:
    return lambda command, **_: subprocess.CompletedProcess(command, code, "", stderr)


class TestSetup:
    def test_prints_what_is_here_and_why(self, capsys: pytest.CaptureFixture[str]):
        here = lab.setup()
        said = capsys.readouterr().out
        assert said == f"{here}\n"
        for row in ("versions ", "machine ", "device ", "dtype ", "modes ", "not here ", "pictures "):
            assert f"\n{row}" in f"\n{said}"
        assert here.device.reason in said and here.dtype.reason in said and here.pictures.reason in said
        assert all(mode.mode in said for mode in here.support)

    def test_quiet_prints_nothing(self, capsys: pytest.CaptureFixture[str]):
        assert isinstance(lab.setup(quiet=True), Here)
        assert capsys.readouterr().out == ""

    def test_modes_are_those_that_run(self):
        here = lab.setup(quiet=True)
        assert here.modes == [mode.mode for mode in here.support if mode.available]

    def test_stays_a_function_whatever_is_imported_first(self):
        program = "import splitwiser_lab.lab.setup; from splitwiser_lab import lab; assert callable(lab.setup)"
        subprocess.run([sys.executable, "-c", program], check=True)

    def test_importing_lab_loads_nothing_heavy(self):
        program = "import sys; from splitwiser_lab import lab; print({'torch', 'plotly', 'numpy'} & set(sys.modules))"
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == "set()"


class TestPictures:
    @pytest.mark.parametrize("sign", ["JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"])
    def test_interactive_where_a_front_end_shows_itself(self, kernel: None, monkeypatch, sign: str):
        monkeypatch.setenv(sign, "something")
        assert choose_pictures().value.startswith("interactive")

    def test_static_where_none_does(self, kernel: None):
        assert choose_pictures().value == "static"
        assert "nbconvert" in choose_pictures().reason

    def test_static_outside_a_notebook(self):
        assert choose_pictures() == Choice("static", "this is not a notebook's kernel")

    @pytest.mark.parametrize(("wish", "form"), [("1", "static"), ("0", "interactive"), ("", "interactive")])
    def test_the_variable_decides(self, kernel: None, monkeypatch, wish: str, form: str):
        monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
        monkeypatch.setenv("SPLITWISER_LAB_STATIC", wish)
        assert choose_pictures().value == form

    def test_plotly_never_stores_its_script_in_a_notebook(self, monkeypatch):
        import plotly.io

        monkeypatch.setattr(plotly.io.renderers, "default", "notebook")
        monkeypatch.setenv("PLOTLY_RENDERER", "notebook")
        display.prepare_plotly("interactive")
        assert plotly.io.renderers.default == "plotly_mimetype"


class TestColab:
    def test_this_is_not_colab(self):
        assert not in_colab()

    def test_what_is_here_is_not_missing(self):
        assert not [line for line in missing_requirements() if line.startswith(("torch", "transformers", "numpy"))]

    def test_what_is_missing_keeps_its_range(self, monkeypatch):
        wanted = ["torch>=2.10", "gguf>=0.17", "jupyterlab>=4", "pytest>=8; extra == 'test'", "rich[x] >=13 ; 1"]

        def version(name: str) -> str:
            if name != "torch":
                raise importlib.metadata.PackageNotFoundError(name)
            return "2.11"

        monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
        monkeypatch.setattr(importlib.metadata, "version", version)
        assert missing_requirements() == ["gguf>=0.17", "rich[x] >=13"]

    def test_installs_hold_every_version_that_is_here(self, monkeypatch):
        seen = {}

        def run(command: list[str], **_: Any) -> Any:
            constraints = command[command.index("--constraint") + 1]
            with open(constraints, encoding="utf-8") as file:
                seen["held"] = file.read().splitlines()
            seen["command"] = command
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        install(["gguf>=0.17"])
        assert seen["command"][-1] == "gguf>=0.17"
        assert f"torch=={importlib.metadata.version('torch')}" in seen["held"]

    def test_a_failure_says_what_and_why(self, monkeypatch):
        monkeypatch.setattr(subprocess, "run", completed(1, "note\nERROR: no matching distribution"))
        with pytest.raises(SplitwiserError, match=r"could not install gguf.*no matching distribution.*again"):
            install(["gguf"])

    def test_setup_installs_on_colab_only(self, monkeypatch, capsys):
        from splitwiser_lab.lab import setup as function

        module, asked = sys.modules[function.__module__], []
        monkeypatch.setattr(module, "missing_requirements", lambda: ["gguf"])
        monkeypatch.setattr(module, "install", asked.append)
        lab.setup(quiet=True)
        assert asked == []
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
        assert lab.setup(quiet=True).pictures.value == "interactive (Colab)"
        assert asked == [["gguf"]]

    def test_the_badge_leads_to_the_repository(self):
        assert REPOSITORY.startswith("https://github.com/")
        name = REPOSITORY.removeprefix("https://github.com/")
        assert f"(https://colab.research.google.com/github/{name}/blob/main/notebooks/x.ipynb)" in badge("x.ipynb")
