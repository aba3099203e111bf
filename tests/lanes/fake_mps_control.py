"""In the place of nvidia-cuda-mps-control: a daemon with a server, or a client that passes a command on to it.

FAKE_MPS says how it behaves: "refuse" (ends at once), "mute" (never answers), "stubborn" (ignores quit).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

folder = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
behaviour = os.environ.get("FAKE_MPS", "")


def daemon() -> None:
    """Start a server and stay."""
    if behaviour == "refuse":
        print("An instance of this daemon is already running")
        sys.exit(3)
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "server.pid").write_text(str(server.pid))
    signal.signal(signal.SIGTERM, lambda *_: (server.kill(), sys.exit(0)))
    (folder / "control.pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


def client(command: str) -> None:
    """Answer when the daemon is there; make it quit."""
    pid = folder / "control.pid"
    if behaviour == "mute" or not pid.exists():
        sys.exit(1)
    if command.startswith("quit") and behaviour != "stubborn":
        os.kill(int(pid.read_text()), signal.SIGTERM)
    (folder / "asked").open("a").write(command + "\n")


if sys.argv[1:] == ["-f"]:
    daemon()
else:
    client(sys.stdin.readline().strip())
