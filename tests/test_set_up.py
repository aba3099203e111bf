"""Setting up on a fresh machine: which environment is kept, what is told when it fails, what make fetches first."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


class TestSetUp:
    @pytest.fixture
    def bootstrap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        """bootstrap.py as a module that works on a folder of the test's own."""
        for name in ("bootstrap.py", "pyproject.toml", "requirements.lock"):
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
        spec = importlib.util.spec_from_file_location("bootstrap", tmp_path / "bootstrap.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        venv = tmp_path / ".venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to(sys.executable)
        (venv / "pyvenv.cfg").write_text("version = 3.12.4\n")
        pip = venv / "bin" / "pip"
        pip.write_text(f"#!/bin/sh\necho pip 26 from {venv.resolve()}/lib\n")
        pip.chmod(0o755)
        monkeypatch.chdir(tmp_path)
        return module

    def test_an_old_python_can_start_it(self):
        ast.parse((ROOT / "bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, 7))

    @pytest.mark.parametrize("changed", ["requirements.lock", "pyproject.toml", ".venv/pyvenv.cfg"])
    def test_it_runs_again_when_what_it_installs_changes(self, bootstrap: ModuleType, tmp_path: Path, changed: str):
        assert not bootstrap.is_ready()
        Path(bootstrap.STAMP).write_text(bootstrap.fingerprint())
        assert bootstrap.is_ready()
        path = tmp_path / changed
        path.write_text(path.read_text().replace("3.12.4", "3.12.5") + "\n")
        assert not bootstrap.is_ready()

    def test_a_half_written_or_moved_environment_is_not_kept(self, bootstrap: ModuleType, tmp_path: Path):
        assert bootstrap.is_whole()
        Path(bootstrap.TORN).touch()
        assert not bootstrap.is_whole()
        Path(bootstrap.TORN).unlink()
        (tmp_path / ".venv/bin/pip").write_text("#!/bin/sh\necho pip 26 from some/other/.venv/lib\n")
        assert not bootstrap.is_whole()

    @pytest.mark.parametrize(
        ("said", "advice"),
        [
            ("ERROR: [Errno 28] No space left on device", "disk is full"),
            ("WARNING: Retrying (...) NewConnectionError\nERROR: No matching distribution found for torch", "network"),
            ("ERROR: No matching distribution found for torch==2.13.0", "torch has no build"),
            ("ERROR: something new", "goes on from here"),
        ],
    )
    def test_a_failure_tells_the_way_out(self, bootstrap: ModuleType, said: str, advice: str):
        text = bootstrap.way_out(["Collecting torch", *said.split("\n")])
        assert advice in text and said.split("\n")[-1] in text and "Collecting" not in text

    def test_a_python_that_cannot_do_it_is_named_with_its_reason(self, bootstrap: ModuleType, tmp_path: Path):
        bare = tmp_path / "python3.12"
        bare.write_text("#!/bin/sh\necho 3.12.3 cpython\nexit 1\n")
        bare.chmod(0o755)
        version, reason = bootstrap.probe(str(bare))
        assert not version and "apt install python3-venv" in reason
        assert "does not start" in bootstrap.probe(str(tmp_path / "none"))[1]
        assert bootstrap.probe(sys.executable) == (tuple(sys.version_info[:3]), "")

    @pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
    @pytest.mark.parametrize("target", ["lab", "demo"])
    def test_make_fetches_the_model_first_and_goes_on_without_it(self, tmp_path: Path, target: str):
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "splitwiser-lab"
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n[ "$1" != fetch ]\n')
        program.chmod(0o755)
        words = ["make", "-f", str(ROOT / "Makefile"), target, "PYTHON=true", f"BIN={program.parent}"]
        # What an outer make was told, as in `make test ARGS=...`, is not for this one.
        outer = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS"}
        env = {name: value for name, value in os.environ.items() if name not in outer}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "told").read_text().split() == ["fetch", target]
        assert "fetched when it is first used" in done.stdout
