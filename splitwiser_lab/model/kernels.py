"""What a layer computes besides its matrix products: norms, rotary embedding, attention, gating.

`PlainKernels` does it with PyTorch's own operations, runs anywhere, and is the reference that every
faster set must equal. Which set suits a device is chosen here, with the reason.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from splitwiser_lab.model.attention import AttentionInput, sdpa, store
from splitwiser_lab.model.config import ModelConfig

Pages = tuple[torch.Tensor, torch.Tensor]  # keys and values of one layer, each [P, page_size, H_kv, D]


class Kernels(Protocol):
    """T tokens, H query heads, H_kv heads of keys and values, D numbers a head. `where` is each set's own."""

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` + `delta` [T, hidden], and its RMS norm. May write into `hidden`."""
        ...

    def rotation(self, positions: torch.Tensor) -> Any:
        """What `attend` wants to know of the positions [T], worked out once for all layers."""
        ...

    def attend(self, qk: torch.Tensor, v: torch.Tensor, rotation: Any, pages: Pages, where: Any) -> torch.Tensor:
        """Attention to the keys up to each token's own -> [T, H, D].

        Queries and keys `qk` [T, H + H_kv, D] are rotated; keys and values `v` [T, H_kv, D] are left in `pages`.
        """
        ...

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 * intermediate] -> [T, intermediate]."""
        ...


class PlainKernels:
    """PyTorch's own operations, on any device."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype) -> None:
        self._eps, self._scale, self._dtype = config.norm_eps, config.rope_scale, dtype
        self._inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device=device)

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if delta is not None:
            hidden += delta  # in place: fresh memory costs more than the sum
        return hidden, rms_norm(hidden, weight, self._eps)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cosine and signed sine of each position's angles, [T, 1, D] each; empty for learned positions."""
        if not self._inv_freq.numel():
            return ()
        angles = positions[:, None].float() * self._inv_freq  # [T, D / 2]
        cos, sin = (angles.cos() * self._scale).to(self._dtype), (angles.sin() * self._scale).to(self._dtype)
        return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]

    def attend(
        self, qk: torch.Tensor, v: torch.Tensor, rotation: Any, pages: Pages, where: AttentionInput
    ) -> torch.Tensor:
        if rotation:
            qk = _rotate(qk, *rotation)
        q, k = torch.split(qk, [qk.shape[1] - v.shape[1], v.shape[1]], dim=1)
        store(k, v, pages, where)
        return sdpa(q, *pages, where)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)  # [T, intermediate] each
        return F.silu(gate).mul_(up)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    # PyTorch has no kernel of its own for this on a CPU and composes more, and larger, operations.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(_constant(eps), length, length, value=1 / x.shape[-1]).rsqrt_()
    out: torch.Tensor = (x * scale.to(x.dtype)).mul_(weight)
    return out


@functools.cache
def _constant(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) of `x` [T, heads, D], pairs half a head apart."""
    out = x * cos
    (low, high), (low_sin, high_sin) = x.chunk(2, dim=-1), signed_sin.chunk(2, dim=-1)
    for half, other, sin in zip(out.chunk(2, dim=-1), (high, low), (low_sin, high_sin), strict=True):
        half.addcmul_(other, sin)  # no copy of x with its halves exchanged
    return out
