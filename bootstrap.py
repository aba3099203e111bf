#!/usr/bin/env python3
"""Set the project up: a virtual environment in .venv, torch, the locked packages, the package itself.

Any python3 from 3.6 on can run it, and it finds a Python that the project can use; it needs nothing but the
standard library. A second run sees the stamp of the first and ends at once. After an interruption it goes on
where it stopped, or starts afresh where packages may have been left half written.

It does not know what the project does, nor how to start it: see the Makefile for that.
"""

import argparse
import contextlib
import fcntl
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from typing import Dict, Iterator, List, Tuple

ROOT = os.path.dirname(os.path.realpath(__file__))
LOCK = os.path.join(ROOT, "requirements.lock")
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
LOG = os.path.join(VENV, "install.log")
STAMP = os.path.join(VENV, "install.stamp")  # written last: what is installed here
TORN = os.path.join(VENV, "install.torn")  # there while pip unpacks: a pip killed then leaves halves behind

OLDEST, NEWEST_TESTED = (3, 11), (3, 13)
FREE_GB = 2.5  # for the CPU build of torch; CUDA wants about 8, and pip says so itself
HEARTBEAT_S = 15.0  # between signs of life where there is no terminal for a running line
AGAIN = "Running the same command again goes on from here."
PROBE = "import sys; print('%d.%d.%d' % sys.version_info[:3], sys.implementation.name); import ensurepip, venv"

HINTS = (  # (what pip says, what to do about it); the first that fits
    (
        "No space left on device|Errno 28",
        "The disk is full: free about 3 GB, or 10 GB where torch brings CUDA. pip unpacks in the folder for "
        "temporary files; if only that one is small, let TMPDIR name a larger one.",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "A proxy with its own certificate stands before the package index: let PIP_CERT name that certificate's file.",
    ),
    (
        "NewConnectionError|ConnectTimeout|Read timed out|ProxyError|name resolution|ConnectionReset",
        "The package index cannot be reached: check the network, and HTTPS_PROXY if there is a proxy.",
    ),
    (
        "No matching distribution found for torch",
        "torch has no build for {machine}. It needs 64-bit Linux with glibc 2.28 or newer, or macOS 14 or newer on "
        "Apple silicon with an arm64 Python.",
    ),
    (
        "No matching distribution found|Failed building wheel|subprocess-exited-with-error",
        "A package has no ready-made build for {machine}; Python 3.11 to 3.13 on Linux and macOS are tested.",
    ),
    ("Permission denied", "The folder .venv belongs to another user: remove it, or run as that user."),
)


class SetupError(Exception):
    """What stopped the set-up, why, and what to do."""


class Progress:
    """One line per step: rewritten in place on a terminal, repeated now and then in a log."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self.live = sys.stdout.isatty()

    def start(self, title: str) -> None:
        """Begin the next step."""
        self.step += 1
        self.title, self.detail = f"[{self.step}/{self.steps}] {title}", ""
        self.started = self.shown = time.monotonic()
        if not self.live:
            print(self.title, flush=True)

    def tick(self) -> None:
        """Show the seconds so far and what pip is doing."""
        now = time.monotonic()
        text = f"{self.title} ... {now - self.started:.0f} s  {self.detail}"
        if self.live:
            print("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        elif now - self.shown > HEARTBEAT_S:
            self.shown = now
            print(text, flush=True)

    def end(self, result: str) -> None:
        """Close the step with its time."""
        clear = "\r\x1b[K" if self.live else ""
        print(f"{clear}{self.title}: {result} in {time.monotonic() - self.started:.1f} s", flush=True)


def clean_environment() -> Dict[str, str]:
    """The environment, less what would send Python or pip anywhere else than to .venv."""
    strays = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "__PYVENV_LAUNCHER__")
    environment = {name: value for name, value in os.environ.items() if name not in strays}
    environment.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONIOENCODING="utf-8")
    return environment


def probe(python: str) -> Tuple[Tuple[int, ...], str]:
    """The version of an interpreter that can build .venv, or () with the reason why it cannot."""
    command = [python, "-c", PROBE]
    try:
        pipe = subprocess.PIPE
        answer = subprocess.run(command, stdout=pipe, stderr=pipe, env=clean_environment(), timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return (), f"does not start: {error}"
    words = answer.stdout.decode("utf-8", "replace").split()
    if len(words) != 2:
        return (), "does not start"
    version = tuple(int(part) for part in words[0].split("."))
    if version[:2] < OLDEST or words[1] != "cpython":
        return (), f"is {words[1]} {words[0]}"
    if answer.returncode:
        package = "python{}.{}-venv".format(*version)
        return (), f"is {words[0]} without venv or ensurepip (Debian, Ubuntu: apt install python3-venv {package})"
    return version, ""


def candidates() -> Iterator[str]:
    """Interpreters that may be here: the one that runs this, then by name along PATH and in the usual places."""
    yield sys.executable
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/bin", "/opt/homebrew/bin", "/usr/bin"]
    for pattern in ("~/.pyenv/versions/*/bin", "~/.local/share/uv/python/*/bin", "~/*conda3/bin"):
        folders += sorted(glob.glob(os.path.expanduser(pattern)))
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        for folder in folders:
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK):
                yield path


def find_python() -> Tuple[str, Tuple[int, ...]]:
    """The interpreter to build .venv with, and its version; one newer than the tested ones only for want of them."""
    seen = {}  # type: Dict[str, str]
    newer = []  # type: List[Tuple[str, Tuple[int, ...]]]
    for path in candidates():
        if path not in seen:
            version, seen[path] = probe(path)
            if version and version[:2] <= NEWEST_TESTED:
                return path, version
            if version:
                newer.append((path, version))
    if newer:
        print("Only a Python newer than the tested 3.11 to 3.13 was found; trying it.", flush=True)
        return newer[0]
    reasons = "".join(f"\n  {path} {reason}" for path, reason in seen.items())
    raise SetupError(
        f"No Python 3.11 to 3.13 that can make a virtual environment was found. Seen:{reasons}\n"
        "Install one, then run this again. Debian, Ubuntu: apt install python3 python3-venv. "
        "macOS: brew install python@3.13. With conda: conda create -n py313 python=3.13, and conda activate py313."
    )


def follow(process: "subprocess.Popen[str]", progress: Progress, lines: List[str]) -> None:
    """Copy what a step prints into the log, and make one readable detail of it."""
    assert process.stdout is not None
    with open(LOG, "a", encoding="utf-8") as log:
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip())
            text = line.strip()
            if text.startswith(("Collecting ", "Downloading ", "Processing ", "Using cached ")):
                progress.detail = text.split(" (from ")[0]
            elif "Retrying (" in text:
                progress.detail = "the package index does not answer, trying again"
            elif text.startswith("Installing collected packages"):
                open(TORN, "w").close()
                progress.detail = f"unpacking {text.count(',') + 1} packages"


def run(command: List[str], progress: Progress, turn: int) -> None:
    """Run one step to its end, or raise SetupError with the way out."""
    lines = []  # type: List[str]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        pass_fds=(turn,),  # a pip that outlives a killed set-up keeps the next one waiting
    )
    reader = threading.Thread(target=follow, args=(process, progress, lines))
    reader.start()
    try:
        while reader.is_alive():
            progress.tick()
            reader.join(0.2)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
        reader.join()
    if code:
        progress.end("failed")
        raise SetupError(way_out(lines, code))
    with contextlib.suppress(FileNotFoundError):
        os.remove(TORN)
    progress.end("done")


def way_out(lines: List[str], code: int = 1) -> str:
    """What to do about a step that failed, judged by what it printed; and the end of that."""
    machine = f"{platform.system()} {platform.machine()} with Python {'.'.join(map(str, installed_version()))}"
    fitting = [hint for pattern, hint in HINTS if re.search(pattern, "\n".join(lines))]
    advice = "pip was killed: is the memory full?" if code < 0 else "".join(fitting[:1]).format(machine=machine)
    errors = [i for i, line in enumerate(lines) if "error" in line.lower() and not line.startswith("WARNING")]
    shown = [line for line in lines[min(errors, default=0) :] if line][-12:]
    log = [f"The full log is in {os.path.relpath(LOG)}."] if os.path.exists(LOG) else []
    return "\n    ".join(["It printed:", *shown]) + "\n" + "\n".join([*log, advice, AGAIN])


def installed_version() -> Tuple[int, ...]:
    """The Python version of .venv, read without starting it; () if there is no whole one."""
    with contextlib.suppress(OSError), open(os.path.join(VENV, "pyvenv.cfg"), encoding="utf-8") as config:
        found = re.search(r"^version(?:_info)? *= *(\d+)\.(\d+)\.(\d+)", config.read(), re.MULTILINE)
        if found and os.path.exists(PYTHON):
            return tuple(int(part) for part in found.groups())
    return ()


def fingerprint() -> str:
    """Changes whenever the set-up has to run again: with the place, the Python, the pins, the project, this script."""
    digest = hashlib.sha256(repr((ROOT, installed_version())).encode("utf-8", "surrogateescape"))
    for path in (LOCK, os.path.join(ROOT, "pyproject.toml"), os.path.abspath(__file__)):
        with open(path, "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def is_ready() -> bool:
    """Whether .venv holds what the project asks for now."""
    with contextlib.suppress(OSError), open(STAMP, encoding="utf-8") as stamp:
        return bool(installed_version()) and stamp.read() == fingerprint()
    return False


def is_whole() -> bool:
    """Whether the .venv that is there can be completed: nothing torn, never moved, and its pip starts."""
    if installed_version()[:2] < OLDEST or os.path.exists(TORN):
        return False
    pip = [os.path.join(VENV, "bin", "pip"), "--version"]  # this script knows where .venv was built
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return VENV + os.sep in subprocess.check_output(pip, env=clean_environment(), encoding="utf-8")
    return False


def make_venv(progress: Progress, turn: int) -> None:
    """Keep the .venv that is there if it can be completed, else build one."""
    if is_whole():
        progress.start("virtual environment .venv, Python {}.{}.{}".format(*installed_version()))
        progress.end("kept")
        return
    if os.path.lexists(VENV):
        shutil.rmtree(VENV)
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < FREE_GB:
        raise SetupError(f"{free_gb:.1f} GB are free where the project lies; the set-up needs {FREE_GB} GB or more.")
    python, version = find_python()
    progress.start("virtual environment .venv, Python {}.{}.{}".format(*version))
    os.mkdir(VENV)
    run([python, "-m", "venv", VENV], progress, turn)


def install(turn: int) -> None:
    """All steps, the stamp last."""
    with open(LOCK, encoding="utf-8") as lock:
        pins = [line.split()[0] for line in lock if "==" in line and not line.startswith("#")]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    pip = [PYTHON, "-m", "pip", "install", "--progress-bar", "off"]
    progress = Progress(steps=4)
    make_venv(progress, turn)
    # Pinned and before the others: asked for by a range, torch would come as its newest build, gigabytes of it.
    progress.start(torch.replace("==", " "))
    run([*pip, torch], progress, turn)
    progress.start("the packages of " + os.path.basename(LOCK))
    run([*pip, "-r", LOCK], progress, turn)
    progress.start("splitwiser_lab itself, editable")
    run([*pip, "--no-deps", "--no-build-isolation", "-e", ROOT], progress, turn)
    with open(STAMP, "w", encoding="utf-8") as stamp:
        stamp.write(fingerprint())


def main() -> int:
    """Set up unless that is done. Exit status: 0, 1 for an error, 130 when interrupted."""
    argparse.ArgumentParser(description="Set the project up in .venv. Takes no options.").parse_args()
    if is_ready():
        return 0
    started = time.monotonic()
    try:
        with open(os.path.abspath(__file__), "rb") as turn:  # set-ups started side by side take turns
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another set-up is at work in this folder; waiting for it.", flush=True)
                fcntl.flock(turn, fcntl.LOCK_EX)
            if not is_ready():
                install(turn.fileno())
        print(f"Ready in {time.monotonic() - started:.0f} s.", flush=True)
        return 0
    except SetupError as error:
        print(f"\nThe set-up stopped.\n{error}", file=sys.stderr)
    except OSError as error:
        print(f"\nThe set-up stopped.\n{way_out([str(error)])}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {AGAIN}", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
