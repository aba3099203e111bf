"""What a measurement's result has in common: it can be written as JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class Document(ABC):
    """Something measured that is ready for JSON."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything measured, as plain values."""

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as JSON text, also written to `path` if one is given (its folder is made)."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text
