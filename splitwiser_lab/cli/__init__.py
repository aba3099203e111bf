"""The command line, `splitwiser-lab`: doctor, fetch, demo, compare, bench, reproduce, ncu, record, trace, lab."""

from __future__ import annotations

import os
import sys

from splitwiser_lab.cli import bench, reproduce, runs  # their commands register themselves
from splitwiser_lab.cli.common import app, notices
from splitwiser_lab.errors import SplitwiserError

__all__ = ["app", "bench", "main", "reproduce", "runs"]


def main() -> None:
    """Run the command line; errors of this package end it with their message and status 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (SplitwiserError, OSError) as error:
        notices.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        notices.print("interrupted")
        sys.exit(130)
