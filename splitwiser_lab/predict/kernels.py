"""How fast this machine's kernels are below the roofs: what a prediction of real times has to know.

A roof is what the best kernel reaches on the largest work. A product of eight rows, an attention over short
sequences, the small operations between them and the Python that launches all of it reach less. Each is
measured here alone, on random numbers, without the model; together they take about three seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F

from splitwiser_lab import hardware
from splitwiser_lab.model.attention import AttentionInput, sdpa
from splitwiser_lab.model.batch import GREEDY, Batch, Sequence
from splitwiser_lab.model.choice import choose_kernels
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.kv_pool import KVPool
from splitwiser_lab.model.linear import linear
from splitwiser_lab.model.runner import runner_for
from splitwiser_lab.model.transformer import Transformer
from splitwiser_lab.model.weights import Weights
from splitwiser_lab.predict.ceilings import Ceilings, measure_ceilings, timed
from splitwiser_lab.predict.work import matrices

_ROWS = {"cpu": (1, 2, 4, 5, 8, 16, 32, 64, 128, 256, 512), "cuda": (1, 8, 16, 64, 256, 1024, 4096)}
_MOST_FLOPS = {"cpu": 1.6e10, "cuda": 2e13}  # of one timing
_WEIGHT_BYTES = {"cpu": 192 * 2**20, "cuda": 2**30}  # together, so that none is found in a cache
_LAYERS = (2, 10)  # of two small models: their difference is what a layer costs the host
_MOST_LAYERS = 200  # where a model is so small that all of it fits a cache, so may these
_PAGE = 32
_ATTENDED = {"cpu": 512, "cuda": 2048}  # tokens of the sequence whose attention is timed
_SMALL_TOKENS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class Kernels:
    """What one machine's kernels reach, for models of one shape.

    `products` maps rows to seconds per weight of a matrix; `attention_flops_per_s` is that of one causal
    sequence; `number_s` is what a number costs on its way through norms, rotation and activation; `layer_s` and
    `batch_s` are the host's share, launching and looking up, per layer and per batch, by the runner that the engine
    would choose; `kv_passes` is how often attention goes over the keys and values of a context.
    """

    ceilings: Ceilings
    products: tuple[tuple[int, float], ...]
    attention_flops_per_s: float
    number_s: float
    layer_s: float
    batch_s: float
    waits_for_host: bool
    kv_passes: int = 3  # plain attention gathers the pages (read, write), then attends (read)

    def product_seconds(self, rows: int, weights: int) -> float:
        """How long a product of `rows` rows with matrices of `weights` numbers in all takes.

        Between two measured numbers of rows it is interpolated, above the last one extended at its FLOP/s.
        """
        last_rows, last = self.products[-1]
        if rows >= last_rows:
            return last * weights * rows / last_rows
        for (low, low_s), (high, high_s) in pairwise(self.products):
            if low <= rows <= high:
                return weights * (low_s + (high_s - low_s) * (rows - low) / (high - low))
        return self.products[0][1] * weights


def measure_kernels(config: ModelConfig, device: str = "auto", dtype: str = "auto") -> Kernels:
    """Time each kind of kernel on `device` for a model of this shape. Raises HardwareError as `measure_ceilings`."""
    where = hardware.choose_device(device).value
    ceilings = measure_ceilings(where, dtype)
    numbers = getattr(torch, ceilings.dtype)
    batch_s, layer_s = _host_seconds(config, where, numbers)
    return Kernels(
        ceilings=ceilings,
        products=_products(config, where, numbers),
        attention_flops_per_s=_attention_rate(config, where, numbers),
        number_s=_number_seconds(config, where, numbers),
        layer_s=layer_s,
        batch_s=batch_s,
        waits_for_host=torch.device(where).type == "cuda",
        kv_passes=1 if choose_kernels(where, ceilings.dtype).value == "triton" else 3,
    )


def _products(config: ModelConfig, device: str, dtype: torch.dtype) -> tuple[tuple[int, float], ...]:
    """Seconds per weight for each number of rows, over all matrices of some layers, laid out as the engine has them."""
    kind, one = torch.device(device).type, matrices(config)
    per_layer = sum(one[name] for name in ("qkv", "output", "mlp")) // config.layers
    layers = min(_MOST_LAYERS, max(2, _WEIGHT_BYTES[kind] // (per_layer * dtype.itemsize)))
    shape = replace(config, layers=layers, vocab_size=64)
    weights = Weights(shape, dtype, device).fill_random()
    weights.pack()
    named = {name: tuple(weights[name].shape) for name in weights.names() if name.startswith("layers.")}
    sizes = {name: size for name, size in named.items() if len(size) == 2}
    found = []
    for rows in _ROWS[kind]:
        some = max(1, int(layers * _MOST_FLOPS[kind] // (2 * rows * layers * per_layer)))
        used = {name: size for name, size in sizes.items() if int(name.split(".")[1]) < some}
        x = {size[1]: torch.rand(rows, size[1], device=device).to(dtype) for size in used.values()}

        def run(used: Mapping[str, tuple[int, ...]] = used, x: Mapping[int, torch.Tensor] = x) -> None:
            for name, size in used.items():
                linear(x[size[1]], weights[name])

        found.append((rows, median(timed(run, device, 3)) / sum(map(math.prod, used.values()))))
    return tuple(found)


def _attention_rate(config: ModelConfig, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the engine's own attention over one causal sequence."""
    tokens = min(_ATTENDED[torch.device(device).type], config.context)
    pool = KVPool(replace(config, layers=1), dtype, device, pages=-(-tokens // _PAGE), page_size=_PAGE)
    where = AttentionInput.of(
        Batch([], [Sequence([0] * tokens, 0, list(range(pool.pages)), GREEDY)]), _PAGE, device, dtype
    )
    q = torch.rand(tokens, config.heads, config.head_dim, device=device).to(dtype)
    pairs = tokens * (tokens + 1) / 2
    return 4.0 * config.heads * config.head_dim * pairs / median(timed(lambda: sdpa(q, *pool.layer(0), where), device))


def _number_seconds(config: ModelConfig, device: str, dtype: torch.dtype) -> float:
    tokens = _SMALL_TOKENS[torch.device(device).type]
    x, weight = (torch.rand(*shape, device=device).to(dtype) for shape in ((tokens, config.hidden), (config.hidden,)))
    gate, up = torch.rand(tokens, 2 * config.intermediate, device=device).to(dtype).chunk(2, dim=-1)

    def run() -> None:
        F.rms_norm(x, weight.shape, weight, 1e-5)
        F.silu(gate) * up

    return median(timed(run, device)) / (x.numel() + gate.numel())


def _host_seconds(config: ModelConfig, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Per batch and per layer: what a decode step costs in a model so small that nothing but launching is left."""
    few, many = (_step_seconds(config, layers, device, dtype) for layers in _LAYERS)
    layer_s = max(0.0, (many - few) / (_LAYERS[1] - _LAYERS[0]))
    return max(0.0, few - _LAYERS[0] * layer_s), layer_s


def _step_seconds(config: ModelConfig, layers: int, device: str, dtype: torch.dtype) -> float:
    """One decode step of one sequence in a model of this family with narrow layers."""
    kv_heads = 2 if config.is_opt else 1
    small = replace(
        config, layers=layers, heads=2, kv_heads=kv_heads, hidden=2 * config.head_dim, intermediate=64, vocab_size=64
    )
    pool = KVPool(small, dtype, device, pages=2, page_size=32)
    weights = Weights(small, dtype, device).fill_random()
    weights.pack()
    batch = Batch([Sequence([1], 40, [0, 1], GREEDY)], [])
    with _stream(device):  # a CUDA graph cannot be captured on the default one
        runner = runner_for(Transformer(weights, pool))  # the engine's own choice: plain launches, or a graph
        runner.run(batch)  # the first batch of a shape compiles its kernels; the next, which warms up, is captured
        return median(timed(lambda: runner.run(batch).tolist(), device, 20))


def _stream(device: str) -> AbstractContextManager[object]:
    if torch.device(device).type != "cuda":
        return nullcontext()
    torch.cuda.synchronize(device)  # weights and pool were made on another stream
    stream: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.Stream(device))
    return stream
