"""The project's frame: what it depends on, which way its imports point, what its files may hold."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "splitwiser_lab"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

MOST_LINES = 320
# Who may import whom: a room imports rooms of its own rank or a lower one; leaves are for everybody.
RANKS = {
    "lanes": 2,
    "model": 1,
    "engine": 3,
    "measure": 4,
    "predict": 4,
    "pipelines": 4,
    "lab": 5,
    "cli": 6,
    "__main__": 6,
}
LEAVES = {"cuda_driver", "errors", "hardware", "metrics", "shared_memory", "timeline"}
DRAWING = {"plotly", "ipywidgets", "anywidget"}
# Imported where they happen to be: they come with Jupyter, with CUDA's torch, with Colab, or from the user.
OPTIONAL = {"IPython", "cuda", "google", "triton", "vllm"}
# Scripts that another Python runs: they import what lies beside them.
BESIDE = {file.stem for file in (PACKAGE / "pipelines" / "vllm" / "engine_side").glob("*.py")}
DISTRIBUTIONS = {"pynvml": "nvidia-ml-py", "huggingface_hub": "huggingface-hub"}


def requirements(*extras: str) -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for one in lists for line in one]


def locked() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def project_files() -> list[Path]:
    """What git has or would add; in an unpacked archive, everything but the set-up and hidden folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if answer.returncode == 0:
        files = [ROOT / name for name in answer.stdout.decode().split("\0") if name]
    else:
        files = [path for path in ROOT.rglob("*") if not path.relative_to(ROOT).parts[0].startswith(".")]
    return [path for path in files if path.is_file()]


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a module imports, at its top, inside functions, or for types alone."""
    here = (*path.relative_to(ROOT).with_suffix("").parts,)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from splitwiser_lab import lab` imports a room: the imported name tells which.
            yield from (".".join([*base, name.name]) for name in node.names)


def room(module: str) -> str:
    """The room of `splitwiser_lab.engine.core` is `engine`; that of `splitwiser_lab.errors` is `errors`."""
    return [*module.split("."), ""][1]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


class TestDependencies:
    def test_conda_users_get_the_same_list(self):
        environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
        pip_lists = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
        assert pip_lists == [PROJECT["dependencies"]]

    def test_the_lock_pins_exactly_and_by_name_only(self):
        for pin in locked():
            assert [s.operator for s in pin.specifier] == ["=="], f"{pin} is not an exact pin"
            assert pin.url is None and "+" not in str(pin.specifier), f"{pin} names a place or a local build"
            assert not pin.name.startswith(("nvidia-cu", "triton", "cuda-")), f"{pin} comes with torch"

    @pytest.mark.parametrize("wanted", requirements("test", "dev"), ids=str)
    def test_the_lock_satisfies_every_range(self, wanted: Requirement):
        pins = [pin for pin in locked() if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
        assert len(pins) == 1, f"requirements.lock has {len(pins)} pins for {wanted.name}"
        version = next(iter(pins[0].specifier)).version
        assert wanted.specifier.contains(version), f"requirements.lock has {wanted.name} {version}, not {wanted}"

    def test_what_the_package_imports_is_declared(self):
        declared = {canonicalize_name(requirement.name) for requirement in requirements()}
        own = {"splitwiser_lab", *sys.stdlib_module_names, *OPTIONAL, *BESIDE}
        undeclared = {
            f"{name_of(path)} imports {top}"
            for path in MODULES
            for top in {name.split(".")[0] for name in imports(path)} - own
            if canonicalize_name(DISTRIBUTIONS.get(top, top)) not in declared
        }
        assert not undeclared, "missing in pyproject.toml: " + ", ".join(sorted(undeclared))


class TestFiles:
    def test_no_file_names_a_place_of_one_machine_or_a_registry(self):
        own_folder = re.compile(r"(?<![\w.~>})\]-])/(?:root|home|Users|work|opt(?!/homebrew))/\w")
        registry = re.compile(r"\b(?:pypi|pythonhosted|npmjs|debian|download\.pytorch)\.(?:org|com|net)\b")
        index = re.compile(r"--(?:(?:extra-)?index-url|find-links|trusted-host)\b")
        found = []
        for path in project_files():
            text = path.read_bytes().decode("utf-8", "ignore")
            for pattern in (own_folder, registry, index):
                found += [f"{name_of(path)}: {match.group()}" for match in pattern.finditer(text)]
        assert not found, "\n".join(found)

    def test_no_module_outgrows_its_idea(self):
        sizes = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
        too_long = {name: lines for name, lines in sizes.items() if lines > MOST_LINES}
        assert not too_long, f"over {MOST_LINES} lines: {too_long}"

    def test_what_the_wheel_carries_is_small(self):
        data = [path for path in (ROOT / "data").rglob("*") if path.is_file() and "large" not in path.parts]
        heavy = {name_of(path): path.stat().st_size for path in data if path.stat().st_size > 1_000_000}
        assert not heavy, f"over 1 MB, so it belongs into data/large, which the wheel leaves out: {heavy}"


class TestPackage:
    def test_imports_point_one_way(self):
        wrong = []
        for path in MODULES:
            here = module_room(path)
            for there in {room(name) for name in imports(path) if name.split(".")[0] == "splitwiser_lab"}:
                allowed = here in ("__init__", there) or there in LEAVES or there.startswith("__")
                allowed |= here in RANKS and RANKS.get(there, 0) in range(1, RANKS[here] + 1)
                if not allowed:
                    wrong.append(f"{name_of(path)} imports {there}")
        assert not wrong, "\n".join(sorted(wrong))

    def test_every_room_has_its_rank(self):
        unknown = {module_room(path) for path in MODULES} - set(RANKS) - LEAVES - {"__init__"}
        assert not unknown, f"give them a place in RANKS or LEAVES: {sorted(unknown)}"

    def test_rooms_of_one_rank_do_not_import_each_other_in_a_circle(self):
        wants: dict[str, set[str]] = {}
        for path in MODULES:
            rooms = {room(name) for name in imports(path) if name.startswith("splitwiser_lab.")}
            wants.setdefault(module_room(path), set()).update(rooms & set(RANKS))
        for here in RANKS:
            reached, ahead = set(), wants.get(here, set()) - {here}
            while ahead:
                reached |= ahead
                ahead = set().union(*(wants.get(there, set()) - {there} for there in ahead)) - reached
            assert here not in reached, f"{here} reaches itself through {sorted(reached)}"

    def test_only_the_lab_draws(self):
        drawing = {
            f"{name_of(path)} imports {top}"
            for path in MODULES
            for top in {name.split(".")[0] for name in imports(path)} & DRAWING
            if module_room(path) != "lab"
        }
        assert not drawing, ", ".join(sorted(drawing))

    def test_importing_the_package_loads_nothing_heavy(self):
        heavy = ["torch", "transformers", "numpy", "huggingface_hub", "pandas", "rich", "typer", *sorted(DRAWING)]
        program = f"import sys, splitwiser_lab; print([name for name in {heavy} if name in sys.modules])"
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
        assert answer.stdout.strip() == "[]"

    def test_every_public_name_says_what_it_is(self):
        """A method may leave it to the class whose method it implements, so its name has to be explained once."""
        silent, methods, explained = [], [], set()
        for path in MODULES:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if not ast.get_docstring(tree):
                silent.append(name_of(path))
            for node in tree.body:
                if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                    continue
                if not ast.get_docstring(node):
                    silent.append(f"{name_of(path)}: {node.name}")
                for method in node.body if isinstance(node, ast.ClassDef) else []:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        methods.append((method.name, f"{name_of(path)}: {node.name}.{method.name}"))
                        if ast.get_docstring(method):
                            explained.add(method.name)
        silent += [place for name, place in methods if name not in explained]
        assert not silent, "no docstring: " + ", ".join(silent)


def lines_of_code(path: Path) -> int:
    """Without blank lines, comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    told: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in silent]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - told)


def test_the_split_engine_is_as_short_to_read_as_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = readme.split("The split engine itself is fourteen files, under 1,300 lines\nof code")[1].split(
        "Imports point"
    )[0]
    files = [ROOT / name for name in re.findall(r"\]\((splitwiser_lab/\S+\.py)\)", told)]
    assert len(files) == len(set(files)) == 14 and {file.parent.name for file in files} == {"engine", "lanes", "model"}
    assert sum(map(lines_of_code, files)) < 1300


def test_lines_of_code_leave_out_what_is_not_code(tmp_path: Path) -> None:
    (file := tmp_path / "a.py").write_text(
        '"""Doc.\n\nMore."""\n\n# no\nx = (\n    1,  # yes\n)\n\n\ndef f():\n    """No."""\n'
    )
    assert lines_of_code(file) == 4
