"""An engine's KV cache seen as whole blocks, whatever its attention kernels make of it, and their way to and fro."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from splitwiser_memory import Memory


@dataclass
class Job:
    """Blocks of one request to `save` or `load`, and the byte of the shared memory at which its pages begin."""

    request: str
    what: str
    blocks: list[int]
    offset: int


class Pages:
    """All layers of a KV cache. Two engines with the same kernels lay a block out alike: it is copied as it is.

    A layer is [blocks, heads, block, 2 × dim] on a CPU; on a GPU [blocks, 2, block, heads, dim], in older versions
    [2, blocks, block, heads, dim]: the dimension of the blocks is found by their number.
    """

    def __init__(self, layers: list[torch.Tensor], blocks: int) -> None:
        """Raises RuntimeError for a cache in which no dimension is that of the blocks."""
        self._layers: list[torch.Tensor] = []
        for layer in layers:
            if blocks not in layer.shape:
                raise RuntimeError(
                    f"SharedConnector cannot find {blocks} blocks in a KV cache of shape {tuple(layer.shape)}: "
                    "use the connector 'example'"
                )
            self._layers.append(layer.movedim(layer.shape.index(blocks), 0))  # [blocks, ...]
        self.page_bytes = sum(layer[0].numel() * layer.element_size() for layer in self._layers)

    def move(self, job: Job, memory: Memory) -> int:
        """Copy a request's blocks to or from `memory`; bytes moved."""
        offset = job.offset
        index = torch.tensor(job.blocks).to(self._layers[0].device, non_blocking=True)  # the host has no need to wait
        for layer in self._layers:
            shape = (len(job.blocks), *layer.shape[1:])
            there = memory.view(layer.dtype, shape, offset)
            if job.what == "save":
                there.copy_(layer[index])
            else:
                layer[index] = there
            offset += there.numel() * there.element_size()
        return offset - job.offset
