"""A decoder-only transformer over packed tokens and paged keys and values.

One pass takes the tokens of many sequences, some prefilling and some decoding, laid end to end
without padding, and returns logits for the rows that asked for a token. It knows weights and pages;
it does not know requests, phases or lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from splitwiser_lab.model.attention import BACKENDS, AttentionInput, store
from splitwiser_lab.model.batch import Batch
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.linear import linear
from splitwiser_lab.model.sampling import sample
from splitwiser_lab.model.weights import Weights

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Transformer:
    """The model's arithmetic. Shapes: T tokens in the batch, H heads, H_kv heads of keys, D per head."""

    def __init__(self, weights: Weights, pool: KVPool, attention: str = "sdpa") -> None:
        self.weights, self.pool, self.config = weights, pool, weights.config
        self._attend = BACKENDS[attention]
        self._inv_freq = torch.tensor(self.config.inv_freq, dtype=torch.float32, device=weights.device)

    @torch.inference_mode()
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

    @torch.inference_mode()
    def logits(self, batch: Batch, rows: list[int]) -> torch.Tensor:
        """Logits [len(rows), vocabulary] in float32 after the tokens at `rows` of the packed batch."""
        device = self.weights.device
        where = AttentionInput.of(batch, self.pool.page_size, device, self.weights.dtype)
        tokens = torch.tensor([t for s in batch.sequences for t in s.tokens], device=device)  # [T]
        positions = torch.tensor([p for s in batch.sequences for p in range(s.start, s.context)], device=device)
        hidden = F.embedding(tokens, self.weights["embed.weight"])  # [T, hidden]
        if self.config.is_opt:
            hidden = hidden + F.embedding(positions + 2, self.weights["positions.weight"])
        rotation = self._rotation(positions)
        for layer in range(self.config.layers):
            hidden = self._layer(layer, hidden, rotation, where)
        last = hidden[torch.tensor(rows, dtype=torch.int64, device=device)]  # [S, hidden]
        head = self.weights["embed.weight" if self.config.tied else "head.weight"]
        return linear(self._norm(last, "final_norm"), head).float()  # [S, vocabulary]

    def _layer(
        self, i: int, hidden: torch.Tensor, rotation: tuple[torch.Tensor, ...], where: AttentionInput
    ) -> torch.Tensor:
        """One block: attention and feed-forward, each with its norm before and its residual after."""
        c, name = self.config, f"layers.{i}"
        qkv = self._linear(self._norm(hidden, f"{name}.attention_norm"), f"{name}.qkv")
        qkv = qkv.view(-1, c.heads + 2 * c.kv_heads, c.head_dim)  # [T, H + 2 H_kv, D]
        qk, v = torch.split(qkv, [c.heads + c.kv_heads, c.kv_heads], dim=1)
        if c.qk_norm:
            q, k = torch.split(qk, [c.heads, c.kv_heads], dim=1)
            qk = torch.cat((self._norm(q, f"{name}.query_norm"), self._norm(k, f"{name}.key_norm")), dim=1)
        if rotation:
            qk = _rotate(qk, *rotation)
        q, k = torch.split(qk, [c.heads, c.kv_heads], dim=1)
        pages = self.pool.layer(i)
        store(k, v, pages, where)
        attended = self._attend(q, *pages, where).reshape(-1, c.heads * c.head_dim)  # [T, H * D]
        hidden += self._linear(attended, f"{name}.output")  # in place: fresh memory costs more than the sum
        hidden += self._mlp(self._norm(hidden, f"{name}.mlp_norm"), name)
        return hidden

    def _mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.config.is_opt:
            return self._linear(_ACTIVATIONS[self.config.activation](self._linear(x, f"{name}.up")), f"{name}.down")
        gate, up = self._linear(x, f"{name}.gate_up").chunk(2, dim=-1)  # [T, intermediate] each
        return self._linear(F.silu(gate).mul_(up), f"{name}.down")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, eps = self.weights[f"{name}.weight"], self.config.norm_eps
        if self.config.is_opt:
            return F.layer_norm(x, weight.shape, weight, self.weights[f"{name}.bias"], eps)
        if x.device.type != "cpu":
            return F.rms_norm(x, weight.shape, weight, eps)
        # PyTorch has no kernel of its own for this on a CPU and composes six; these are four.
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        return (x * squares.div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)).mul_(weight)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cosine and signed sine of each position's angles, [T, 1, D] each; empty for learned positions."""
        if not self.config.inv_freq:
            return ()
        angles = positions[:, None].float() * self._inv_freq  # [T, D / 2]
        scale, dtype = self.config.rope_scale, self.weights.dtype
        cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
        return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) of `x` [T, heads, D], pairs half a head apart."""
    low, high = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((high, low), dim=-1), signed_sin)
