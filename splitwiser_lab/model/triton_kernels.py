"""The set of kernels for GPUs: launches of this package's Triton kernels, sized for the model and the device.

Two attention kernels read the pages as they are. Where a GPU lacks matrix units that Triton can use
(below sm_80), or in float32, decode sums plainly and prefill goes to PyTorch's own attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from splitwiser_lab.model import triton_attention, triton_fused
from splitwiser_lab.model.attention import attend_prefill
from splitwiser_lab.model.batch import NOT_A_NUMBER
from splitwiser_lab.model.choice import has_matrix_units
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.kernels import Pages
from splitwiser_lab.model.paged import ITEM, QUERY_BLOCK, PagedInput

_ARGMAX_BLOCK = 4096
_PLAIN_SUM_ELEMENTS = 8192  # heads x tokens x numbers a head that a program can hold in registers


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel cuts its work: tokens of keys at once, warps a program, loads under way, programs for each SM.

    The figures are those that were fastest on an H200 in bfloat16, among some ten tried for each shape.
    """

    tokens: int
    warps: int
    stages: int
    per_sm: int = 4


class TritonKernels:
    """One per lane: it keeps the scratch memory in which parts of long contexts are merged."""

    def __init__(
        self, config: ModelConfig, device: str, dtype: torch.dtype, page_size: int, capability: tuple[int, int]
    ) -> None:
        """`capability` is the GPU's compute capability."""
        self._config, self._page_size = config, page_size
        self._eps, self._dtype, self._device = config.norm_eps, dtype, device
        self._inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device=device)
        self._group = config.heads // config.kv_heads
        self._block_d = max(16, triton.next_power_of_2(config.head_dim))
        self._scale = 1 / math.sqrt(config.head_dim) / math.log(2)
        self.matrix_units = has_matrix_units(capability, dtype)
        self.decode_tiles, self.prefill_tiles = self._choose_tiles()
        self._scratch: list[tuple[torch.Tensor, ...]] = []

    def _choose_tiles(self) -> tuple[Tiles, Tiles]:
        if self.matrix_units:
            if self._block_d > 64:
                return Tiles(64, 4, 3), Tiles(128, 8, 3)
            return Tiles(64, 2, 3, per_sm=5), Tiles(64, 8, 3)
        tokens = _PLAIN_SUM_ELEMENTS // (triton.next_power_of_2(self._group) * self._block_d)
        return Tiles(min(max(tokens, 16), 64), 4, 2), Tiles(0, 0, 0)

    def add_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(hidden)
        size = hidden.shape[1]
        block = triton.next_power_of_2(size)
        triton_fused.add_norm_kernel[(len(hidden),)](
            hidden, delta, weight, out, self._eps, size, block, delta is not None, num_warps=4 if block <= 4096 else 8
        )
        return hidden, out

    def rotation(self, positions: torch.Tensor) -> torch.Tensor:
        """The kernel works out the angles itself."""
        return positions

    def attend(
        self, qk: torch.Tensor, v: torch.Tensor, rotation: torch.Tensor, pages: Pages, where: PagedInput
    ) -> torch.Tensor:
        kv_heads = v.shape[1]
        out = torch.empty((len(qk), qk.shape[1] - kv_heads, qk.shape[2]), dtype=qk.dtype, device=qk.device)
        if where.rows:
            self._decode(qk, v, pages, where, out)
        if len(where.block_row):
            rows = slice(where.rows, len(qk))
            q = self._rotate_and_store(qk[rows], v[rows], rotation[rows], pages, where.slots[rows])
            if self.matrix_units:
                self._prefill(q, pages, where, out)
            else:
                attend_prefill(q, *pages, where.spans, out[rows])
        return out

    def _decode(self, qk: torch.Tensor, v: torch.Tensor, pages: Pages, where: PagedInput, out: torch.Tensor) -> None:
        kv_heads, dim = v.shape[1:]
        items, tiles = len(where.items) // len(ITEM), self.decode_tiles
        block_g = triton.next_power_of_2(self._group)
        triton_attention.decode_kernel[(kv_heads, items)](
            qk, v, *pages, out, *self.reserve(items, where.rows), where.pages, where.items,
            self._inv_freq, self._config.rope_scale, self._scale,
            qk.stride(0), v.stride(0), pages[0].stride(0), pages[0].stride(1),
            self._group, max(16, block_g) if self.matrix_units else block_g, dim, self._block_d, self._page_size,
            tiles.tokens, self.matrix_units, bool(self._config.inv_freq),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _rotate_and_store(
        self, qk: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, pages: Pages, slots: torch.Tensor
    ) -> torch.Tensor:
        """Rotated queries [n, H, D] of prompts; their keys and values go to the pages."""
        q, k = torch.split(qk, [qk.shape[1] - v.shape[1], v.shape[1]], dim=1)
        rows, heads, dim = q.shape
        kv_heads = k.shape[1]
        if not self._config.inv_freq:
            size = kv_heads * dim
            triton_fused.store_kernel[(rows,)](
                k, v, *pages, slots, k.stride(0), v.stride(0), size, triton.next_power_of_2(size)
            )
            return q
        out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
        triton_fused.rotate_store_kernel[(rows,)](
            q, k, v, out, *pages, positions, slots, self._inv_freq, self._config.rope_scale,
            q.stride(0), k.stride(0), v.stride(0), heads, kv_heads, dim,
            triton.next_power_of_2(heads), triton.next_power_of_2(kv_heads), triton.next_power_of_2(dim // 2),
        )  # fmt: skip
        return out

    def _prefill(self, q: torch.Tensor, pages: Pages, where: PagedInput, out: torch.Tensor) -> None:
        """Queries `q` [n, H, D] of the prompts, into the rows of `out` after those that decode."""
        _, heads, dim = q.shape
        tiles = self.prefill_tiles
        triton_attention.prefill_kernel[(heads, len(where.block_row))](
            q, *pages, out, where.pages, where.block_row, where.block_tokens, where.block_position, where.block_page,
            where.rows, self._scale, q.stride(0), pages[0].stride(0), pages[0].stride(1),
            self._group, dim, self._block_d, self._page_size, QUERY_BLOCK, tiles.tokens,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def reserve(self, items: int, rows: int) -> tuple[torch.Tensor, ...]:
        """Room for the parts of a batch; `arrived` is 0 between launches."""
        if not self._scratch or len(self._scratch[-1][0]) < items or len(self._scratch[-1][3]) < rows:
            c = self._config
            shapes = (items, c.heads, c.head_dim), (items, c.heads), (items, c.heads)
            floats = (torch.empty(shape, dtype=torch.float32, device=self._device) for shape in shapes)
            # What was there before is kept: captured graphs go on using it.
            self._scratch.append((*floats, torch.zeros((rows, c.kv_heads), dtype=torch.int32, device=self._device)))
        return self._scratch[-1]

    def pick(self, logits: torch.Tensor, places: torch.Tensor, board: torch.Tensor) -> torch.Tensor:
        """Greedy tokens [E] of `logits` [E, vocabulary], also written to their `places` on the `board`.

        NOT_A_NUMBER for a row that holds a NaN.
        """
        rows, size = logits.shape
        parts = triton.cdiv(size, _ARGMAX_BLOCK)
        tops = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
        found = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
        tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
        if rows:
            triton_fused.argmax_parts_kernel[(rows, parts)](
                logits, tops, found, size, logits.stride(0), NOT_A_NUMBER, _ARGMAX_BLOCK, num_warps=8
            )
            triton_fused.argmax_kernel[(rows,)](
                tops, found, places, tokens, board, parts, NOT_A_NUMBER, triton.next_power_of_2(parts), num_warps=1
            )
        return tokens

    def resolve(self, tokens: torch.Tensor, board: torch.Tensor) -> torch.Tensor:
        """Token ids [T], those that the device itself picked taken from the `board`."""
        out = torch.empty_like(tokens)
        triton_fused.resolve_kernel[(triton.cdiv(len(tokens), 256),)](tokens, board, out, len(tokens), 256)
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, size = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
        block = min(triton.next_power_of_2(size), 2048)
        triton_fused.gate_kernel[(rows, triton.cdiv(size, block))](gate_up, out, size, block)
        return out
