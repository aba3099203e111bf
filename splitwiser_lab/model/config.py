"""The shape of a decoder-only model, read from its Hugging Face configuration.

Knows four RoPE families (Llama and SmolLM2, Mistral, Qwen2, Qwen3) and OPT. It does not know where
weights come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from splitwiser_lab.errors import ModelError

ROPE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*ROPE_FAMILIES, "opt")
_OPT_ACTIVATIONS = ("relu", "gelu")


@dataclass(frozen=True)
class ModelConfig:
    """Everything the transformer needs to know; sizes are counts, `context` is in tokens."""

    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    norm_eps: float
    activation: str
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    inv_freq: tuple[float, ...] = ()
    rope_scale: float = 1.0
    eos_token_ids: tuple[int, ...] = ()

    @property
    def is_opt(self) -> bool:
        """OPT differs from the rotary families in norms, biases, positions and feed-forward."""
        return self.family == "opt"

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Our name of each weight -> its shape and the Hugging Face tensors it is made of, stacked on dim 0.

        Query, key and value are one matrix, and so are gate and up: one product instead of three or two.
        """
        hidden, heads, kv_heads, dim = self.hidden, self.heads, self.kv_heads, self.head_dim
        root = "model.decoder." if self.is_opt else "model."
        table: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}

        def add(name: str, shape: tuple[int, ...], *sources: str) -> None:
            table[name] = (shape, sources)

        def linear(name: str, out: int, into: int, bias: bool, *sources: str) -> None:
            add(f"{name}.weight", (out, into), *(f"{source}.weight" for source in sources))
            if bias:
                add(f"{name}.bias", (out,), *(f"{source}.bias" for source in sources))

        def norm(name: str, source: str, size: int = hidden) -> None:
            add(f"{name}.weight", (size,), f"{source}.weight")
            if self.is_opt:
                add(f"{name}.bias", (size,), f"{source}.bias")

        linear("embed", self.vocab_size, hidden, False, f"{root}embed_tokens")
        if self.is_opt:  # OPT's position table starts with two rows that are never used
            linear("positions", self.context + 2, hidden, False, f"{root}embed_positions")
        for i in range(self.layers):
            ours, theirs = f"layers.{i}", f"{root}layers.{i}"
            attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
            qkv = (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj")
            linear(f"{ours}.qkv", (heads + 2 * kv_heads) * dim, hidden, self.qkv_bias, *qkv)
            output = f"{attn}.out_proj" if self.is_opt else f"{attn}.o_proj"
            linear(f"{ours}.output", hidden, heads * dim, self.output_bias, output)
            if self.qk_norm:
                norm(f"{ours}.query_norm", f"{attn}.q_norm", dim)
                norm(f"{ours}.key_norm", f"{attn}.k_norm", dim)
            if self.is_opt:
                linear(f"{ours}.up", self.intermediate, hidden, self.mlp_bias, f"{theirs}.fc1")
                linear(f"{ours}.down", hidden, self.intermediate, self.mlp_bias, f"{theirs}.fc2")
                norm(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm")
                norm(f"{ours}.mlp_norm", f"{theirs}.final_layer_norm")
            else:
                gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
                linear(f"{ours}.gate_up", 2 * self.intermediate, hidden, self.mlp_bias, *gate_up)
                linear(f"{ours}.down", hidden, self.intermediate, self.mlp_bias, f"{mlp}.down_proj")
                norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
                norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
        norm("final_norm", f"{root}final_layer_norm" if self.is_opt else f"{root}norm")
        if not self.tied:
            linear("head", self.vocab_size, hidden, False, "lm_head")
        return table

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token leaves in the pool, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    @classmethod
    def from_hf(cls, config: Any) -> ModelConfig:
        """Read a transformers configuration. Raises ModelError for what this transformer cannot run exactly."""
        family = getattr(config, "model_type", "?")
        if family not in FAMILIES:
            raise ModelError(
                f"model family {family!r} is not one this engine runs ({', '.join(FAMILIES)}). "
                "Load it with transformers.AutoModelForCausalLM and use the Hugging Face pipeline instead."
            )
        if family == "opt":
            return cls._from_opt(config)
        heads = config.num_attention_heads
        activation = config.hidden_act
        if activation != "silu":
            raise ModelError(f"{family} with hidden_act={activation!r} is not supported: this engine runs 'silu'.")
        attention_bias = bool(getattr(config, "attention_bias", False))
        inv_freq, scale = _rope(config)
        return cls(
            family=family,
            vocab_size=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            # Inside its window, sliding attention is plain attention: the window is the usable context.
            context=min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 1 << 60),
            norm_eps=config.rms_norm_eps,
            activation=activation,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=family != "qwen2" and attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            inv_freq=inv_freq,
            rope_scale=scale,
            eos_token_ids=_token_ids(config.eos_token_id),
        )

    @classmethod
    def _from_opt(cls, config: Any) -> ModelConfig:
        odd = [
            f"{name}={value!r}"
            for name, wanted in {
                "do_layer_norm_before": True,
                "word_embed_proj_dim": config.hidden_size,
                "layer_norm_elementwise_affine": True,
                "_remove_final_layer_norm": False,
            }.items()
            if (value := getattr(config, name, wanted)) != wanted
        ]
        if odd or config.activation_function not in _OPT_ACTIVATIONS:
            raise ModelError(
                f"this OPT variant ({', '.join(odd) or config.activation_function}) is not supported: OPT-350m and "
                "Galactica differ from the other sizes. Use another OPT size or the Hugging Face pipeline."
            )
        return cls(
            family="opt",
            vocab_size=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            intermediate=config.ffn_dim,
            context=config.max_position_embeddings,
            norm_eps=1e-5,
            activation=config.activation_function,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=config.enable_bias,
            output_bias=config.enable_bias,
            mlp_bias=config.enable_bias,
            qk_norm=False,
            eos_token_ids=_token_ids(config.eos_token_id),
        )


def _rope(config: Any) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies of rotary embedding, as transformers computes them (with Llama 3's scaling and others)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ModelError(
            f"rope_type {kind!r} changes its frequencies with the length, which pages of past keys cannot follow. "
            "Use a model without it, or the Hugging Face pipeline."
        )
    rope = LlamaRotaryEmbedding(config=config)
    return tuple(rope.inv_freq.tolist()), float(rope.attention_scaling)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
