"""What the loop that steps an engine asks of the process that computes: vLLM adds this class to its worker.

On a GPU they are two processes, as vLLM comes; on a CPU they are one.
"""

from __future__ import annotations

import sys
from typing import Any

from splitwiser_stopwatch import stopwatch


class SplitwiserExtension:
    """Methods that `LLMEngine.collective_rpc` calls by name."""

    def splitwiser_page_bytes(self) -> int | None:
        """Bytes of a block in all layers; None where the connector is not ours."""
        shared = sys.modules.get("splitwiser_shared")  # loaded by vLLM where it is this engine's connector
        return shared.pages.page_bytes if shared and shared.pages else None

    def splitwiser_moved(self) -> list[list[Any]]:
        """`[what, bytes, seconds, request]` of all that was handed over since this was last asked."""
        told: list[list[Any]] = stopwatch.take()
        return told
