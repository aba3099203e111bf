"""How a lane on a GPU runs a batch: one upload, then kernels, and at decode one CUDA graph for all of them.

Each lane has a runner of its own, used under the lane's stream only, since a graph keeps the share of
the GPU that its stream had at capture. Picked tokens stay on the device, on a board with a place for
each sequence (its first page), so that the next step can be launched before anybody has read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from splitwiser_lab.model.batch import Batch
from splitwiser_lab.model.choice import choose_kernels
from splitwiser_lab.model.graph_shapes import MOST_TOKENS, ROWS, UsualWork, padded
from splitwiser_lab.model.paged import Packed, PagedInput, Shape, pack
from splitwiser_lab.model.sampling import resample
from splitwiser_lab.model.transformer import Transformer


@dataclass(frozen=True)
class Step:
    """A batch of one shape as a CUDA graph: write its numbers into `numbers`, replay, read `logits` and `picked`."""

    graph: torch.cuda.CUDAGraph
    numbers: torch.Tensor
    where: PagedInput
    logits: torch.Tensor  # [E, vocabulary]
    picked: torch.Tensor  # [E]


OnLaunch = Callable[[], object]


def _nothing() -> None:
    """Whoever runs a batch need not know when it begins."""


class PlainRunner:
    """Runs batches with PyTorch's own operations; the next one has to wait for the tokens of the last."""

    depth = 1

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer

    def run(self, batch: Batch, on_launch: OnLaunch = _nothing) -> torch.Tensor:
        """The picked token ids [S] of a batch."""
        on_launch()
        return self._transformer.run(batch)

    def warm_up(self, work: UsualWork) -> None:
        """There is nothing to make."""


class GraphRunner:
    """Runs batches over a transformer's weights and pool. Make it and use it under one stream."""

    depth = 2  # batches that may be under way: each takes its tokens from the one before it on the device

    @torch.inference_mode(False)  # its tensors are written to again, also by callers who are not in that mode
    def __init__(self, transformer: Transformer, multiprocessors: int | None = None) -> None:
        """`multiprocessors` are those that the stream may use; None for all of the device's."""
        from splitwiser_lab.model.triton_kernels import TritonKernels  # only where Triton was found to work

        weights, pool = transformer.weights, transformer.pool
        self._model, self._pool = transformer, pool
        self._device = torch.device(weights.device)
        properties = torch.cuda.get_device_properties(self._device)
        capability = (properties.major, properties.minor)
        self._kernels = TritonKernels(weights.config, weights.device, weights.dtype, pool.page_size, capability)
        programs = self._kernels.decode_tiles.per_sm * (multiprocessors or properties.multi_processor_count)
        self._parts = -(-programs // weights.config.kv_heads)
        self._kernels.reserve(ROWS[-1] + self._parts, ROWS[-1])
        self._board = torch.zeros(pool.pages + 1, dtype=torch.int32, device=self._device)
        self._seen: set[Shape] = set()
        self._steps: dict[Shape, Step] = {}
        self._graph_memory = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch, on_launch: OnLaunch = _nothing) -> torch.Tensor:
        """Launch a batch; keys and values go to the pool. Gives the picked token ids [S], still on the device.

        `on_launch` is called when all is ready on the host, before anything is put on the stream. The
        first batch of a shape is launched kernel by kernel, which also compiles them; the second is captured.
        """
        shape = self._padded(batch)
        packed = pack(batch, self._pool.page_size, self._parts, self._pool.pages, shape)
        if shape in self._seen and shape not in self._steps:
            self._steps[shape] = self._capture(packed)
        on_launch()
        if step := self._steps.get(shape):
            _upload(packed, step.numbers)
            step.graph.replay()
            where, logits, picked = step.where, step.logits, step.picked
        else:
            where = PagedInput.views(_upload(packed, self._numbers(packed)), packed)
            logits, picked = self._launch(where)
            if self._repeatable(shape):
                self._seen.add(shape)
        return self._read(batch, where, logits, picked)

    def warm_up(self, work: UsualWork) -> None:
        """Compile the kernels and capture the graphs of usual batches, each by one that consists of padding alone."""
        for shape in work.shapes():
            if shape not in self._steps and self._repeatable(shape):
                packed = pack(Batch([], []), self._pool.page_size, self._parts, self._pool.pages, shape)
                self._launch(PagedInput.views(_upload(packed, self._numbers(packed)), packed))
                self._steps[shape] = self._capture(packed)

    def _read(self, batch: Batch, where: PagedInput, logits: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        """The tokens of a batch without its padding; those that are not greedy are picked here, kernel by kernel."""
        decode, prefill = ([s.sampling for s in part if s.sampling] for part in (batch.decode, batch.prefill))
        first, second = slice(len(decode)), slice(where.rows, where.rows + len(prefill))

        def real(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat((rows[first], rows[second])) if decode and prefill else rows[first if decode else second]

        if any(spec.temperature > 0 for spec in decode + prefill):
            tokens = resample(real(picked), real(logits), decode + prefill)
            self._board[real(where.board)] = tokens
            return tokens
        return real(picked)

    def _padded(self, batch: Batch) -> Shape:
        """The shape of the graph for this batch, or its own where there can be none."""
        shape = Shape.of(batch)
        return padded(shape) if self._repeatable(shape) else shape

    def _repeatable(self, shape: Shape) -> bool:
        """Whether batches of the shape can be graphs: no prompts where attention takes them one by one."""
        return not shape.tokens or (self._kernels.matrix_units and shape.tokens <= MOST_TOKENS)

    def _launch(self, where: PagedInput) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [E, vocabulary] and greedy tokens [E] of the rows that ask for one."""
        tokens = self._kernels.resolve(where.tokens, self._board)
        ends = where.ends if len(where.block_row) else None  # in a step that only decodes every row asks
        logits = self._model.forward(tokens, where.positions, where, ends, self._kernels)
        return logits, self._kernels.pick(logits, where.board, self._board)

    def _numbers(self, packed: Packed) -> torch.Tensor:
        """Room on the device for a batch's numbers, and for those of any other of its shape."""
        return torch.empty(packed.offsets[-1] + self._pool.pages, dtype=torch.int32, device=self._device)

    @torch.inference_mode(False)
    def _capture(self, packed: Packed) -> Step:
        numbers = self._numbers(packed)
        where = PagedInput.views(numbers, packed)
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(), nor any other wait: behind a long prefill on this stream, the one thread that
        # feeds all lanes would starve decode. A capture only notes kernels. Other threads may go on allocating.
        graph.capture_begin(pool=self._graph_memory, capture_error_mode="thread_local")
        try:
            logits, picked = self._launch(where)
        finally:
            graph.capture_end()
        return Step(graph, numbers, where, logits, picked)


Runner = PlainRunner | GraphRunner


def runner_for(transformer: Transformer, multiprocessors: int | None = None) -> Runner:
    """The fastest runner that works on the transformer's GPU. Call it under the lane's stream."""
    weights = transformer.weights
    if choose_kernels(weights.device, str(weights.dtype).removeprefix("torch.")).value == "triton":
        return GraphRunner(transformer, multiprocessors)
    return PlainRunner(transformer)


def _upload(packed: Packed, to: torch.Tensor) -> torch.Tensor:
    """Copy the numbers to the device without waiting: the pinned memory is kept by PyTorch until they are there."""
    to[: len(packed.numbers)].copy_(torch.from_numpy(packed.numbers).pin_memory(), non_blocking=True)
    return to
