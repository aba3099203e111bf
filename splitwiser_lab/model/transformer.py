"""A decoder-only transformer over packed tokens and paged keys and values.

One pass takes the tokens of many sequences, some prefilling and some decoding, laid end to end
without padding, and returns logits for the rows that asked for a token. It knows weights and pages;
it does not know requests, phases or lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from splitwiser_lab.model.attention import AttentionInput
from splitwiser_lab.model.batch import Batch
from splitwiser_lab.model.kernels import Kernels, PlainKernels, rms_norm
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.linear import linear
from splitwiser_lab.model.packed import gated
from splitwiser_lab.model.sampling import sample
from splitwiser_lab.model.weights import Weights

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Transformer:
    """The model's arithmetic. Shapes: T tokens in the batch, H heads, H_kv heads of keys, D per head.

    No weight asks for a gradient, so nothing is kept for one. `torch.inference_mode` is not needed, and would be a
    trap: an interrupt inside it, at the wrong moment, leaves the caller's thread in that mode.
    """

    def __init__(self, weights: Weights, pool: KVPool) -> None:
        self.weights, self.pool, self.config = weights, pool, weights.config
        self._plain = PlainKernels(self.config, weights.device, weights.dtype)

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute a batch, leave its keys and values in the pool, return the picked token ids [S]."""
        rows, row, specs = [], 0, []
        for sequence in batch.sequences:
            row += len(sequence.tokens)
            if sequence.sampling is not None:
                rows.append(row - 1)
                specs.append(sequence.sampling)
        logits = self.logits(batch, rows)
        return sample(logits, specs)

    def logits(self, batch: Batch, rows: list[int]) -> torch.Tensor:
        """Logits [len(rows), vocabulary] in float32 after the tokens at `rows` of the packed batch."""
        device = self.weights.device
        where = AttentionInput.of(batch, self.pool.page_size, device, self.weights.dtype)
        tokens = torch.tensor([t for s in batch.sequences for t in s.tokens], device=device)  # [T]
        positions = torch.tensor([p for s in batch.sequences for p in range(s.start, s.context)], device=device)
        ends = torch.tensor(rows, dtype=torch.int64, device=device)
        return self.forward(tokens, positions, where, ends, self._plain).float()

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, where: Any, ends: torch.Tensor | None, kernels: Kernels
    ) -> torch.Tensor:
        """Logits [E, vocabulary], in the weights' dtype, after the tokens at rows `ends` [E], or after all of them.

        `tokens` and `positions` are [T]; `where` tells `kernels` where they lie in the pool.
        """
        hidden = F.embedding(tokens, self.weights["embed.weight"])  # [T, hidden]
        if self.config.is_opt:
            hidden = hidden + F.embedding(positions + 2, self.weights["positions.weight"])
        rotation = kernels.rotation(positions)
        delta = None  # what the last block adds to `hidden`: it is added where the next norm reads it
        for i in range(self.config.layers):
            hidden, normed = self._add_norm(kernels, hidden, delta, f"layers.{i}.attention_norm")
            delta = self._attention(kernels, i, normed, rotation, where)
            hidden, normed = self._add_norm(kernels, hidden, delta, f"layers.{i}.mlp_norm")
            delta = self._mlp(kernels, normed, f"layers.{i}")
        if ends is not None:
            hidden, delta = hidden[ends], None if delta is None else delta[ends]  # [E, hidden]
        _, last = self._add_norm(kernels, hidden, delta, "final_norm")
        return linear(last, self.weights["embed.weight" if self.config.tied else "head.weight"])  # [E, vocabulary]

    def _attention(self, kernels: Kernels, i: int, x: torch.Tensor, rotation: Any, where: Any) -> torch.Tensor:
        c, name = self.config, f"layers.{i}"
        qkv = self._linear(x, f"{name}.qkv").view(-1, c.heads + 2 * c.kv_heads, c.head_dim)  # [T, H + 2 H_kv, D]
        qk, v = torch.split(qkv, [c.heads + c.kv_heads, c.kv_heads], dim=1)
        if c.qk_norm:
            q, k = torch.split(qk, [c.heads, c.kv_heads], dim=1)
            qk = torch.cat((self._norm(q, f"{name}.query_norm"), self._norm(k, f"{name}.key_norm")), dim=1)
        attended = kernels.attend(qk, v, rotation, self.pool.layer(i), where)  # [T, H, D]
        return self._linear(attended.reshape(-1, c.heads * c.head_dim), f"{name}.output")

    def _mlp(self, kernels: Kernels, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.config.is_opt:
            return self._linear(_ACTIVATIONS[self.config.activation](self._linear(x, f"{name}.up")), f"{name}.down")
        gate = self.weights.get(f"{name}.gate.weight")
        if gate is None:
            x = kernels.gate(self._linear(x, f"{name}.gate_up"))
        else:
            x = gated(x, gate, self.weights[f"{name}.up.weight"], self.weights.get(f"{name}.gate_up.bias"))
        return self._linear(x, f"{name}.down")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, eps = self.weights[f"{name}.weight"], self.config.norm_eps
        if self.config.is_opt:
            return F.layer_norm(x, weight.shape, weight, self.weights[f"{name}.bias"], eps)
        return rms_norm(x, weight, eps)

    def _add_norm(
        self, kernels: Kernels, hidden: torch.Tensor, delta: torch.Tensor | None, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` + `delta`, and its norm: the model's own, whichever that is."""
        if self.config.is_opt:
            if delta is not None:
                hidden += delta
            return hidden, self._norm(hidden, name)
        return kernels.add_norm(hidden, delta, self.weights[f"{name}.weight"])
