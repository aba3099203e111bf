"""A JupyterLab of the test's own, and a headless Chromium that drives it as a person would.

Knows notebooks, cells and widgets; knows nothing of what the cells do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from splitwiser_lab.model.fetch import cache_dir

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-the-test"
MODEL = "smollm2-135m"
Theme = Literal["JupyterLab Light", "JupyterLab Dark"]

# A fresh, silent browser: no sandbox (tests may run as root), nothing that asks its maker for news.
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
_SETTINGS: dict[str, dict[str, Any]] = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # what is scrolled away can be looked at, too
}


def why_not() -> str:
    """The reason why a browser cannot be driven here; empty if it can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (pip install -e .[test])"
    if find_chromium() is None:
        return "Chromium is not here (Debian, Ubuntu: apt-get install chromium)"
    if not (cache_dir() / "models" / MODEL / "complete").is_file():
        return f"{MODEL} is not in the cache"
    return ""


def find_chromium() -> str | None:
    """The browser's program; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def server(notebooks: Path, home: Path, theme: Theme = "JupyterLab Light") -> Iterator[str]:
    """Serve `notebooks` on the loopback with settings of its own under `home`; gives the address of /lab."""
    words = ["-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    words += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={notebooks}", "--LabApp.extension_manager=readonly"]
    with _serving([*words, "--ServerApp.port={port}"], notebooks, home, theme) as port:
        yield f"http://127.0.0.1:{port}/lab"


@contextmanager
def lab_command(folder: Path, home: Path) -> Iterator[str]:
    """What `make lab` runs, in `folder`; gives the address that it tells the user to open."""
    with _serving(
        ["-m", "splitwiser_lab", "lab", "--no-browser", "--port={port}"], folder, home, "JupyterLab Light", token=""
    ):
        log, told = home / "jupyter.log", re.compile(r"http://127\.0\.0\.1:\d+/\S+token=[0-9a-f]+")
        _wait_for(lambda: told.search(log.read_text()) is not None, 30, lambda: f"no address:\n{log.read_text()}")
        yield told.findall(log.read_text())[0]


@contextmanager
def _serving(words: list[str], folder: Path, home: Path, theme: Theme, token: str = TOKEN) -> Iterator[int]:
    """Run a command that serves on the port it is given; without a `token` it makes one of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (home / "jupyter.log").open("w") as log:
        environment = _environment(home, theme) | ({"JUPYTER_TOKEN": token} if token else {})
        command = [sys.executable, *(word.format(port=port) for word in words)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        try:
            _wait_for(lambda: _answers(port), 60, lambda: f"no JupyterLab:\n{(home / 'jupyter.log').read_text()}")
            yield port
        finally:
            process.terminate()  # it ends its kernels first
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(home: Path, theme: Theme) -> dict[str, str]:
    """Jupyter's own folders under `home`, with our settings in them."""
    settings = {**_SETTINGS, "apputils-extension/themes": {"theme": theme}}
    for name, values in settings.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    for variable in ("JUPYTER_TOKEN", "SPLITWISER_LAB_STATIC", "COLAB_RELEASE_TAG"):
        environment.pop(variable, None)
    return environment


def plain_copy(notebook: Path, folder: Path) -> Path:
    """A notebook without outputs and without the badge, which is a picture from the web."""
    import nbformat

    copy = Path(shutil.copy(notebook, folder))
    plain = nbformat.read(copy, as_version=4)
    plain.cells[0].source = "# Notebook"
    for cell in plain.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(plain, copy)
    return copy


class Notebook:
    """One notebook in one page: of that name, or whatever the address opens.

    `errors` are the console's, `strangers` requests to anywhere but the server.
    """

    def __init__(self, page: Any, address: str, name: str = "") -> None:
        self.page = page
        self.errors: list[str] = []
        self.strangers: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._note(request.url))
        page.goto(f"{address}/tree/{name}?token={TOKEN}&reset" if name else address)
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.wait_until_idle()

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Until the status bar says that the kernel is idle."""
        self.page.wait_for_function(
            "() => /\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText ?? '')",
            timeout=1e3 * seconds,
        )

    def run_all(self, seconds: float = 240) -> None:
        """Run every cell and wait for the last one's number."""
        self.start_all()
        self.page.wait_for_function(
            "() => !/\\[\\*\\]:/.test(document.querySelector('.jp-Notebook').innerText)", timeout=1e3 * seconds
        )

    def start_all(self) -> None:
        """Run > Run All Cells; asks again while nothing begins."""
        for _ in range(5):
            self.page.click("text=Run >> nth=0")
            self.page.click(".lm-Menu-item:has-text('Run All Cells') >> nth=0")
            time.sleep(1.0)
            if self.page.evaluate(
                "() => document.querySelector('.jp-Notebook').innerText.match(/\\[[*\\d]+\\]:/) !== null"
            ):
                break

    def _note(self, url: str) -> None:
        if not re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|(data|blob|about):", url):
            self.strangers.append(url)


@contextmanager
def browser(width: int = 1280, height: int = 1360) -> Iterator[Any]:
    """A page of a new Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=_FLAGS)
        try:
            yield chromium.new_page(viewport={"width": width, "height": height})
        finally:
            chromium.close()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=2):
            return True
    except OSError:
        return False


def _wait_for(what: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise())
        time.sleep(0.2)
