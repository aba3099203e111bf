"""What a measurement's result has in common: it can be written as JSON."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class Document(ABC):
    """Something measured that is ready for JSON."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything measured, as plain values."""

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as JSON text, also written to `path` if one is given (its folder is made).

        A file that is there is replaced at once: whoever reads it, or ends this process, finds the old one or the new.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            _write(Path(path), text + "\n")
        return text


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe, or a device such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # of a link, what it points to
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
