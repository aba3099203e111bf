"""Changes the mode of an engine without making anybody wait, and says why where it cannot be changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from splitwiser_lab.engine.engine import Engine
from splitwiser_lab.engine.modes import MODES
from splitwiser_lab.errors import SplitwiserError
from splitwiser_lab.lab.dashboard.knobs import Settings


class Flips:
    """Brings the engine to the mode of `settings`, in a thread of its own: lanes may have to start first."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.settings = settings
        self.notice = ""  # why the latest wish could not be met
        self._engine = engine
        self._setting = threading.Lock()
        self._set: tuple[str, dict[str, int]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="splitwiser-lab-flip")

    def wish(self, settings: Settings) -> None:
        """Ask for these settings and return at once; of several wishes the latest wins."""
        self.settings = settings
        self._thread.submit(self.settle)

    def settle(self) -> None:
        """Bring the engine to the mode that is wished for now; where it cannot be, it stays and `notice` says why."""
        with self._setting:
            wanted = self.settings
            options = wanted.options_of(MODES[wanted.mode])
            if (wanted.mode, options) == self._set:
                return
            try:
                self._engine.set_mode(wanted.mode, **options)
                self._set, self.notice = (wanted.mode, options), ""
            except SplitwiserError as error:
                self.notice = f"The mode stays {self._engine.mode}: {error}"
                self.settings = replace(self.settings, mode=self._engine.mode)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wishes wait meanwhile: whoever holds them may set modes of its own, and calls `settle` afterwards."""
        with self._setting:
            self._set = None
            yield

    def close(self) -> None:
        """Drop the wishes that wait, and end the thread."""
        self._thread.shutdown(cancel_futures=True)
