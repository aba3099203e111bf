"""The paged pool of keys and values that all phases, lanes and processes share.

It is memory and nothing else: who owns which page is the engine's business.
"""

from __future__ import annotations

import torch

from splitwiser_lab.errors import HardwareError
from splitwiser_lab.hardware import free_memory_bytes
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.shared_memory import Handle, allocate, attach

_SHARE_OF_FREE_MEMORY = {"cpu": 0.2, "cuda": 0.7}
_DEFAULT_CONTEXTS = 8  # on a CPU, room for so many requests of full length is plenty


class KVPool:
    """Keys and values as `[layers, 2, pages, page_size, kv_heads, head_dim]`, allocated once.

    A token at position p of a request lives in page `block_table[p // page_size]`, row `p % page_size`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: str,
        pages: int,
        page_size: int,
        handle: Handle | None = None,
    ) -> None:
        """Allocate the pool, or map the memory that another process exported as `handle`.

        Raises HardwareError when memory is short, or cannot be mapped.
        """
        self.pages, self.page_size, self.dtype, self.device = pages, page_size, dtype, device
        shape = (config.layers, 2, pages, page_size, config.kv_heads, config.head_dim)
        self.nbytes = pages * page_size * config.kv_bytes_per_token(dtype.itemsize)
        self.buffer = allocate(self.nbytes, device) if handle is None else attach(handle, self.nbytes, device)
        self.data = self.buffer.tensor(dtype, shape)

    @property
    def tokens(self) -> int:
        """How many tokens fit."""
        return self.pages * self.page_size

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each `[pages, page_size, kv_heads, head_dim]`."""
        return self.data[index, 0], self.data[index, 1]


def pages_for(
    config: ModelConfig, dtype: torch.dtype, device: str, page_size: int, kv_tokens: int | None = None
) -> int:
    """Number of pages for `kv_tokens`, or for a share of the free memory. Raises HardwareError when none fit."""
    if page_size < 1:
        raise HardwareError(f"page_size={page_size} makes no sense: use 16 or 32 tokens a page.")
    kind = torch.device(device).type
    per_token = config.kv_bytes_per_token(dtype.itemsize)
    free = free_memory_bytes(device)
    if kv_tokens is None:
        kv_tokens = int(free * _SHARE_OF_FREE_MEMORY[kind]) // per_token
        if kind == "cpu":
            kv_tokens = min(kv_tokens, _DEFAULT_CONTEXTS * config.context)
    if kv_tokens < page_size:
        raise HardwareError(
            f"a KV pool of {kv_tokens} tokens holds no page of {page_size}: ask for more kv_tokens "
            f"(one token takes {per_token} bytes, {free / 2**20:.0f} MiB are free)."
        )
    if kv_tokens * per_token > free:
        raise HardwareError(
            f"a KV pool of {kv_tokens} tokens takes {kv_tokens * per_token / 2**30:.1f} GiB ({per_token} bytes each), "
            f"but {free / 2**30:.1f} GiB are free on {device}: ask for at most {free // per_token} kv_tokens."
        )
    return kv_tokens // page_size
