"""What the loop that steps an engine asks of the process that computes: vLLM adds this class to its worker.

On a GPU they are two processes, as vLLM comes; on a CPU they are one.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from splitwiser_stopwatch import stopwatch


def complaint_of(order: dict[str, Any], device: str = "cuda") -> str | None:
    """Multiply as the package's own lanes do before they start, and say what came out wrong; None if nothing did.

    The package is not here, so its file is read. It is the process that computes which multiplies: each client of MPS
    has SMs of its own.
    """
    spec = importlib.util.spec_from_file_location("splitwiser_products", order["program"])
    assert spec is not None and spec.loader is not None
    products = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(products)
    matrices = products.random_matrices(order["shapes"], order["dtype"], device)
    tried, wrong = products.wrong_products(matrices)
    del matrices
    torch.cuda.empty_cache()  # what this process holds is measured
    if not wrong:
        return None
    return str(
        products.complaint(
            order["dtype"], tried, wrong, products.part_under_mps(order["share"], device), order["advice"]
        )
    )


class SplitwiserExtension:
    """Methods that `LLMEngine.collective_rpc` calls by name."""

    def splitwiser_page_bytes(self) -> int | None:
        """Bytes of a block in all layers; None where the connector is not ours."""
        shared = sys.modules.get("splitwiser_shared")  # loaded by vLLM where it is this engine's connector
        return shared.pages.page_bytes if shared and shared.pages else None

    def splitwiser_check_products(self, order: dict[str, Any]) -> str | None:
        """What this engine's part of the GPU multiplies wrongly; None if nothing."""
        return complaint_of(order)

    def splitwiser_moved(self) -> list[list[Any]]:
        """`[what, bytes, seconds, request]` of all that was handed over since this was last asked."""
        told: list[list[Any]] = stopwatch.take()
        return told
