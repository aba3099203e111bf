"""Documents on disk: an old one stays whole until the new one is."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from splitwiser_lab.measure.document import Document


class Found(Document):
    def __init__(self, figure: int) -> None:
        self.figure = figure

    def to_dict(self) -> dict[str, Any]:
        return {"figure": self.figure}


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "a.json"
    assert Found(1).to_json(path) + "\n" == path.read_text()
    seen: list[str] = []
    write = Path.write_text

    def half(self: Path, text: str, encoding: str) -> int:
        write(self, text[:3], encoding=encoding)
        seen.append(path.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        Found(2).to_json(path)
    assert '"figure": 1' in seen[0] and '"figure": 1' in path.read_text()
    assert os.listdir(path.parent) == ["a.json"]


def test_links_stay_links(tmp_path: Path) -> None:
    Found(1).to_json(tmp_path / "a.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    Found(2).to_json(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and '"figure": 2' in (tmp_path / "a.json").read_text()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    Found(3).to_json(tmp_path / "pipe")
    reader.join(10)
    assert '"figure": 3' in read[0]
