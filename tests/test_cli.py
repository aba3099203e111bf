"""The command line: what it prints, what it writes, and how it ends when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build
from typer.testing import CliRunner

from splitwiser_lab.cli import app, main

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama"
    build("llama", max_position_embeddings=1024).save_pretrained(folder)
    return str(folder)


def test_doctor_names_every_mode_and_writes_json(tmp_path: Path) -> None:
    result = run(app, ["doctor", "--device", "cpu", "--json", str(tmp_path / "d.json")])
    assert result.exit_code == 0
    found = json.loads((tmp_path / "d.json").read_text())
    states = {mode["mode"]: mode for mode in found["modes"]}
    assert set(states) == {"sequential", "chunked", "processes", "streams", "partitioned", "mps", "auto"}
    assert states["chunked"]["available"] and not states["mps"]["available"]
    assert all(name in result.stdout and state["reason"] for name, state in states.items())


@pytest.mark.parametrize(
    ("shares", "said"), [("all", "this device is a CPU"), ("101", "from 1 to 100"), ("x", "25,50")]
)
def test_doctor_says_why_shares_cannot_be_tried(shares: str, said: str) -> None:
    result = run(app, ["doctor", "--device", "cpu", "--mps-shares", shares])
    assert result.exit_code != 0 and said in str(result.exception) + result.output


def test_compare_prints_the_table_and_writes_the_figures(model: str, tmp_path: Path) -> None:
    words = ["compare", "--model", model, "--modes", "sequential,chunked", "--requests", "3", "--prompt-tokens", "20"]
    words += ["--output-tokens", "6", "--repeats", "1", "--kv-tokens", "4096", "--json", str(tmp_path / "c.json")]
    result = run(app, words)
    assert result.exit_code == 0, result.output
    assert "sequential" in result.stdout and "identical" in result.stdout
    found = json.loads((tmp_path / "c.json").read_text())
    assert [run["mode"] for run in found["runs"]] == ["sequential", "chunked"]
    assert found["runs"][0]["total_output_tokens"] == 18 and found["workload"]["requests"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["compare", "--modes", "warp"], "unknown mode 'warp'"),
        (["compare", "--device", "tpu"], "device 'tpu' is not supported"),
        (["compare", "--workload", "nowhere.csv"], "nowhere.csv"),
        (["fetch", "no-such-model"], "unknown model 'no-such-model'"),
        (["lab", "nowhere.ipynb"], "no notebook 'nowhere.ipynb'"),
    ],
)
def test_errors_end_with_their_message_and_status_1(
    words: list[str], said: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if "--model" not in words and words[0] == "compare":
        words = [*words, "--model", model]
    monkeypatch.setattr(sys, "argv", ["splitwiser-lab", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 1
    assert said in " ".join(printed.err.split()) and "Traceback" not in printed.err


def test_fetch_says_where_the_model_lies(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["splitwiser-lab", "fetch", model])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and model in capsys.readouterr().out


def test_lab_binds_to_loopback_with_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "n.ipynb").write_text("{}")
    assert run(app, ["lab", "n.ipynb", "--no-browser"]).exit_code == 0
    [words] = started
    assert "--ServerApp.ip=127.0.0.1" in words and "--no-browser" in words
    assert not any("token=" in word and word.endswith("=") for word in words), "an empty token would switch it off"


@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_lab_starts_for_root_too_whom_jupyter_turns_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user: int, allowed: bool
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words))
    monkeypatch.setattr("os.geteuid", lambda: user, raising=False)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "n.ipynb").write_text("{}")
    assert run(app, ["lab", "n.ipynb", "--no-browser"]).exit_code == 0
    assert ("--allow-root" in started[0]) is allowed


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, splitwiser_lab; print([m for m in ('torch', 'transformers', 'plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
