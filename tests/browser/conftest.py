"""A browser is needed here: where there is none, the tests are skipped and say what would bring it."""

from __future__ import annotations

import importlib.util

import pytest
from jupyter import find_chromium

from splitwiser_lab.model.fetch import cache_dir

MODEL = "smollm2-135m"


def why_not() -> str:
    """The reason why a browser cannot be driven here; empty if it can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (pip install -e .[test])"
    if find_chromium() is None:
        return "Chromium is not here (Debian, Ubuntu: apt-get install chromium)"
    if not (cache_dir() / "models" / MODEL / "complete").is_file():
        return f"{MODEL} is not in the cache"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if item.get_closest_marker("browser") and reason:
            item.add_marker(pytest.mark.skip(reason=reason))
