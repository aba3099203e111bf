"""How a lane on a GPU runs a batch: one upload, then kernels, and at decode one CUDA graph for all of them.

Each lane has a runner of its own, used under the lane's stream only, since a graph keeps the share of
the GPU that its stream had at capture. Picked tokens stay on the device, on a board with a place for
each sequence (its first page), so that the next step can be launched before anybody has read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from splitwiser_lab.model.batch import Batch
from splitwiser_lab.model.choice import choose_kernels
from splitwiser_lab.model.paged import Packed, PagedInput, pack
from splitwiser_lab.model.sampling import resample
from splitwiser_lab.model.transformer import Transformer

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
_ROWS_STEP = 128  # beyond those
_PROGRAMS_PER_SM = 4  # of the decode attention, resident at once


@dataclass(frozen=True)
class DecodeGraph:
    """A decode step for a fixed number of rows: write a batch's numbers into `numbers`, replay, read `picked`."""

    graph: torch.cuda.CUDAGraph
    numbers: torch.Tensor
    logits: torch.Tensor  # [rows, vocabulary]
    picked: torch.Tensor  # [rows]
    places: torch.Tensor  # [rows] on the board


class PlainRunner:
    """Runs batches with PyTorch's own operations; the next one has to wait for the tokens of the last."""

    depth = 1

    def __init__(self, transformer: Transformer) -> None:
        self.run = transformer.run

    def prepare(self, most_rows: int) -> None:
        """There is nothing to capture."""


class GraphRunner:
    """Runs batches over a transformer's weights and pool. Make it and use it under one stream."""

    depth = 2  # batches that may be under way: each takes its tokens from the one before it on the device

    def __init__(self, transformer: Transformer, multiprocessors: int | None = None) -> None:
        """`multiprocessors` are those that the stream may use; None for all of the device's."""
        from splitwiser_lab.model.triton_kernels import TritonKernels  # only where Triton was found to work

        weights, pool = transformer.weights, transformer.pool
        self._model, self._pool = transformer, pool
        self._device = torch.device(weights.device)
        properties = torch.cuda.get_device_properties(self._device)
        capability = (properties.major, properties.minor)
        self._kernels = TritonKernels(weights.config, weights.device, weights.dtype, pool.page_size, capability)
        programs = _PROGRAMS_PER_SM * (multiprocessors or properties.multi_processor_count)
        self._parts = -(-programs // weights.config.kv_heads)
        self._board = torch.zeros(pool.pages + 1, dtype=torch.int32, device=self._device)
        self._graphs: dict[int, DecodeGraph] = {}
        self._graph_memory = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """Launch a batch; keys and values go to the pool. Gives the picked token ids [S], still on the device."""
        specs = [s.sampling for s in batch.sequences if s.sampling is not None]
        if not batch.prefill and len(specs) == len(batch.decode):
            step = self._graph(len(batch.decode))
            packed = self._pack(batch, len(step.picked))
            _upload(packed, step.numbers)
            step.graph.replay()
            logits, picked, places = (t[: len(specs)] for t in (step.logits, step.picked, step.places))
        else:
            packed = self._pack(batch)
            numbers = torch.empty(len(packed.numbers), dtype=torch.int32, device=self._device)
            _upload(packed, numbers)
            where = PagedInput.views(numbers, packed)
            logits, picked = self._launch(where, where.ends)
            places = where.board
        if any(spec.temperature > 0 for spec in specs):
            picked = resample(picked, logits, specs)
            self._board[places] = picked
        return picked

    @torch.inference_mode()
    def prepare(self, most_rows: int) -> None:
        """Capture the decode graphs for batches of up to `most_rows` now, rather than when they are first needed."""
        for rows in reversed([rows for rows in _ROWS if rows <= _padded_rows(most_rows)]):
            self._graph(rows)

    def _pack(self, batch: Batch, rows: int | None = None) -> Packed:
        return pack(batch, self._pool.page_size, self._parts, self._pool.pages, rows)

    def _launch(self, where: PagedInput, ends: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [E, vocabulary] and greedy tokens [E] of the rows `ends`, or of all."""
        tokens = self._kernels.resolve(where.tokens, self._board)
        logits = self._model.forward(tokens, where.positions, where, ends, self._kernels)
        return logits, self._kernels.pick(logits, where.board, self._board)

    def _graph(self, decoding: int) -> DecodeGraph:
        rows = _padded_rows(decoding)
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        return self._graphs[rows]

    def _capture(self, rows: int) -> DecodeGraph:
        """Record a step over padding: it reads no page and writes none."""
        packed = self._pack(Batch([], []), rows)
        numbers = torch.empty(len(packed.numbers) + self._pool.pages, dtype=torch.int32, device=self._device)
        _upload(packed, numbers)
        where = PagedInput.views(numbers, packed)
        self._launch(where)  # compiles what is not compiled yet, and takes the memory that is not the graph's own
        stream = torch.cuda.current_stream(self._device)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(): it would wait for all other lanes. Other threads may go on allocating.
        graph.capture_begin(pool=self._graph_memory, capture_error_mode="thread_local")
        try:
            logits, picked = self._launch(where)
        finally:
            graph.capture_end()
        return DecodeGraph(graph, numbers, logits, picked, where.board)


Runner = PlainRunner | GraphRunner


def runner_for(transformer: Transformer, multiprocessors: int | None = None) -> Runner:
    """The fastest runner that works on the transformer's GPU. Call it under the lane's stream."""
    weights = transformer.weights
    if choose_kernels(weights.device, str(weights.dtype).removeprefix("torch.")).value == "triton":
        return GraphRunner(transformer, multiprocessors)
    return PlainRunner(transformer)


def _padded_rows(decoding: int) -> int:
    """The number of rows of the graph that runs `decoding` sequences."""
    return next((rows for rows in _ROWS if rows >= decoding), -(-decoding // _ROWS_STEP) * _ROWS_STEP)


def _upload(packed: Packed, to: torch.Tensor) -> None:
    """Copy the numbers to the device without waiting: the pinned memory is kept by PyTorch until they are there."""
    to[: len(packed.numbers)].copy_(torch.from_numpy(packed.numbers).pin_memory(), non_blocking=True)
