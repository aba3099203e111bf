"""A model's weights in one piece of memory, which other processes can map.

One piece means one file descriptor (or one CUDA handle) to pass on, whatever the number of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from splitwiser_lab.errors import ModelError
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.packed import pack, packable, packing, view
from splitwiser_lab.shared_memory import Handle, allocate, attach

_LOOKED_UP = ("embed.weight", "positions.weight")  # read row by row
_ALIGN = 64  # bytes: a cache line, and more than any vector load asks for


class Weights:
    """Named views, e.g. `weights["layers.0.qkv.weight"]`, into one buffer on one device."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: str,
        handle: Handle | None = None,
        packed: bool = False,
    ) -> None:
        """Allocate room for `config` on `device`, or map what another process filled, packed, and exported as `handle`.

        Raises HardwareError when memory is short, or cannot be mapped.
        """
        self.config, self.dtype, self.device = config, dtype, device
        shapes = {name: shape for name, (shape, _) in config.layout().items()}
        offsets, end = {}, 0
        for name, shape in shapes.items():
            offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
        self.nbytes = end
        self.buffer = allocate(end, device) if handle is None else attach(handle, end, device)
        self._tensors = {name: self.buffer.tensor(dtype, shape, offsets[name]) for name, shape in shapes.items()}
        self._plain = dict(self._tensors)  # the same memory; packed views do not keep it alive
        self.packed = False
        if packed:
            self._pack(view)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor, or None where this family has none of that name (biases, query and key norms)."""
        return self._tensors.get(name)

    def names(self) -> list[str]:
        """All names; once packed, `layers.N.gate` and `layers.N.up` may stand for `layers.N.gate_up`."""
        return list(self._tensors)

    def multiplied(self) -> list[torch.Tensor]:
        """The matrices [out, in] of all products, as they were before packing."""
        head = "embed.weight" if self.config.tied else "head.weight"
        looked_up = [name for name in _LOOKED_UP if name != head]
        return [tensor for name, tensor in self._plain.items() if tensor.dim() == 2 and name not in looked_up]

    def pack(self) -> None:
        """Lay the matrices out as this CPU multiplies fastest; afterwards only `linear` can read them.

        Does nothing on a GPU, where it was done already, or where `packing()` says why it cannot be.
        """
        if torch.device(self.device).type == "cpu" and not self.packed and packing().value == "packed":
            self._pack(pack)

    def _pack(self, lay_out: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.packed = True
        for name, tensor in self._plain.items():
            if tensor.dim() != 2 or name in _LOOKED_UP:
                continue
            # As two matrices, gate and up are gated within their products: see `packed.gated`.
            halves = tensor.chunk(2) if name.endswith(".gate_up.weight") else ()
            if halves and packable(halves[0]):
                del self._tensors[name]
                for part, half in zip(("gate", "up"), halves, strict=True):
                    self._tensors[name.replace("gate_up", part)] = lay_out(half)
            elif packable(tensor):
                self._tensors[name] = lay_out(tensor)

    def fill(self, read: Callable[[str], torch.Tensor]) -> Weights:
        """Copy in the tensors that `read` gives for Hugging Face names. Raises ModelError when one does not fit."""
        for name, (shape, sources) in self.config.layout().items():
            row = 0
            for source in sources:
                try:
                    tensor = read(source)
                except KeyError as error:
                    raise ModelError(
                        f"the weights have no tensor {source!r}, which a {self.config.family} model needs. "
                        "Check that the files belong to this config.json, or download the model again."
                    ) from error
                rows = tensor.shape[0]
                if tensor.shape[1:] != shape[1:] or row + rows > shape[0]:
                    raise ModelError(
                        f"tensor {source!r} has shape {list(tensor.shape)}, which does not fit {name} {list(shape)}. "
                        "Check that the files belong to this config.json."
                    )
                self._tensors[name][row : row + rows].copy_(tensor)
                row += rows
            if row != shape[0]:
                raise ModelError(f"{name} needs {shape[0]} rows, the weights hold {row}: wrong config.json?")
        return self

    def fill_random(self, seed: int = 0) -> Weights:
        """Random weights of the right shape: for speed, and for tests that need no file."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, tensor in self._tensors.items():
            if "norm.weight" in name:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, 0.02, generator=generator)
        return self
