"""How much work a batch is: arithmetic and bytes of each operator, counted from the model's shape alone.

Counted is the least that the work takes: every weight is read once per batch, every key and value of the
past is read once, those of new tokens are written once, a causal mask halves the arithmetic, and what goes
from one operator to the next never leaves the caches. One multiplication with its addition is 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from splitwiser_lab.model.batch import Batch
from splitwiser_lab.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Part:
    """What a batch computes of one sequence: `tokens` new ones, after which `context` lie in the pool.

    `picks` says whether a next token is asked for: only then do logits have to be computed.
    """

    tokens: int
    context: int
    picks: bool = True

    @property
    def pairs(self) -> int:
        """How many pairs of a new token and one it looks at: each sees all before it, and itself."""
        return self.tokens * (self.context - self.tokens) + self.tokens * (self.tokens + 1) // 2


def prefill(prompt_tokens: int, batch: int = 1) -> tuple[Part, ...]:
    """`batch` whole prompts of this length."""
    return (Part(prompt_tokens, prompt_tokens),) * batch


def decode(context: int, batch: int = 1) -> tuple[Part, ...]:
    """One step of `batch` sequences, each with `context` tokens in the pool once it is done."""
    return (Part(1, context),) * batch


def parts_of(batch: Batch) -> tuple[Part, ...]:
    """What a batch of the engine consists of."""
    return tuple(Part(len(s.tokens), s.context, s.sampling is not None) for s in batch.sequences)


@dataclass(frozen=True, slots=True)
class Operator:
    """One kind of work, over all layers. `rows` is how many rows a product has, 0 for what is no product.

    `weights` counts the numbers in the matrix, over all layers.
    """

    name: str
    flops: float
    bytes: float
    rows: int = 0
    weights: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """A batch as operators, in the order in which a layer has them."""

    operators: tuple[Operator, ...]

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return sum(operator.flops for operator in self.operators)

    @property
    def bytes(self) -> float:
        """Bytes between memory and chip."""
        return sum(operator.bytes for operator in self.operators)

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte: what decides between compute and memory (Williams et al., 2009)."""
        return self.flops / self.bytes

    def of(self, name: str) -> Operator:
        """The operator of that name: "qkv", "attention", "output", "mlp", "head", "rest"."""
        return next(operator for operator in self.operators if operator.name == name)


def work(config: ModelConfig, parts: Sequence[Part], itemsize: int) -> Work:
    """What one batch of these parts takes; `itemsize` is the bytes of a number (4 in float32, 2 in bfloat16)."""
    tokens, picked = sum(part.tokens for part in parts), sum(part.picks for part in parts)
    return count(
        config, itemsize, tokens, picked, sum(part.context for part in parts), sum(part.pairs for part in parts)
    )


def count(config: ModelConfig, itemsize: int, tokens: int, picked: int, context: int, pairs: int) -> Work:
    """The same from sums over the sequences: new tokens, tokens asked for, tokens in the pool, pairs attended."""
    sizes = matrices(config)
    products = [_product(name, sizes[name], tokens, itemsize) for name in ("qkv", "output", "mlp")]
    head = _product("head", sizes["head"] if picked else 0, picked, itemsize)
    # Scores and their weighted sum: two products of head_dim over every pair, for every head.
    flops = 4.0 * config.layers * config.heads * config.head_dim * pairs
    attention = Operator("attention", flops, float(context * config.kv_bytes_per_token(itemsize)))
    looked_up = tokens * config.hidden * (2 if config.is_opt else 1)  # rows of the tables of tokens and positions
    rest = Operator("rest", 0.0, float((sizes["rest"] + looked_up) * itemsize))
    return Work((products[0], attention, *products[1:], head, rest))


@cache
def matrices(config: ModelConfig) -> dict[str, int]:
    """How many weights "qkv", "output", "mlp", "head" and "rest" (norms, biases) have, over all layers."""
    found = dict.fromkeys(("qkv", "output", "mlp", "head", "rest"), 0)
    kinds = {"qkv": "qkv", "output": "output", "gate_up": "mlp", "up": "mlp", "down": "mlp", "head": "head"}
    for name, (shape, _) in config.layout().items():
        owner, _, what = name.rpartition(".")
        if owner in ("embed", "positions"):
            continue  # a table: a batch looks up rows of it
        kind = kinds.get(owner.split(".")[-1], "rest") if what == "weight" else "rest"
        found[kind] += math.prod(shape)
    if config.tied:
        found["head"] = config.vocab_size * config.hidden
    return found


def numbers_between(config: ModelConfig, tokens: int) -> float:
    """How many numbers go through norms, rotation, activation and sums, over all layers: work that is no product."""
    rotated = (config.heads + config.kv_heads) * config.head_dim if config.inv_freq else 0
    return float(tokens * config.layers * (2 * config.hidden + rotated + config.intermediate))


def _product(name: str, weights: int, rows: int, itemsize: int) -> Operator:
    return Operator(name, 2.0 * weights * rows, float(weights * itemsize), rows, weights)
