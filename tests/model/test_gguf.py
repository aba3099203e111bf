"""GGUF to safetensors: names, the order of rotated rows, and a whole small file against the model it came from."""

from __future__ import annotations

from pathlib import Path

import gguf as gguf_library
import pytest
import torch
from tiny_models import build
from transformers import PreTrainedModel

from splitwiser_lab.errors import ModelError
from splitwiser_lab.model.config import ModelConfig
from splitwiser_lab.model.gguf import _hf_name, _split_halves, convert
from splitwiser_lab.model.loading import load

TO_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """The other direction, from llama.cpp's own naming."""
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return f"{fixed[stem]}.weight"
    _, _, layer, *rest = stem.split(".")
    return f"blk.{layer}.{TO_GGUF['.'.join(rest)]}.weight"


def side_by_side(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's permutation of q and k (convert_hf_to_gguf.py, `LlamaModel.permute`)."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(model: PreTrainedModel, path: Path, family: str = "llama") -> None:
    """A GGUF file of this model in float32, with a small byte-level tokenizer."""
    config, writer = model.config, gguf_library.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|end|>", "Ġ", *letters]
    tokens += [a + b for a in letters for b in letters][: config.vocab_size - len(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([f"{token[0]} {token[1]}" for token in tokens[2 + len(letters) :]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                tensor = side_by_side(tensor, heads)
        writer.add_tensor(gguf_name(name), tensor.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_file(tmp_path: Path, tied: bool) -> None:
    """Every weight comes back to the bit, in transformers' names and order, with a tokenizer that works."""
    model = build("llama", tie_word_embeddings=tied, head_dim=8)
    write(model, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "converted")
    loaded = load(tmp_path / "converted", "cpu", torch.float32)
    config = ModelConfig.from_hf(model.config)
    assert loaded.config.tied is tied
    assert loaded.config.inv_freq == config.inv_freq
    for name, (_, sources) in config.layout().items():
        assert torch.equal(loaded.weights[name], torch.cat([model.state_dict()[s] for s in sources])), name
    ids = loaded.tokenizer("prefill and decode").input_ids
    assert loaded.tokenizer.decode(ids) == "prefill and decode"


def test_names() -> None:
    state = build("llama").state_dict()
    assert [_hf_name(gguf_name(name)) for name in state] == list(state)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_rotated_rows_go_back(heads: int) -> None:
    weight = torch.randn(heads * 8, 5)
    assert torch.equal(_split_halves(side_by_side(weight, heads), heads), weight)
    assert not torch.equal(_split_halves(weight, heads), weight)


def test_rotated_pairs_by_hand() -> None:
    """One head of four rows: pairs (0, 1) and (2, 3) side by side become (0, 2) and (1, 3) half a head apart."""
    assert _split_halves(torch.arange(4.0)[:, None], 1)[:, 0].tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_truncated_file_is_said_to_be_broken(tmp_path: Path, keep: float) -> None:
    write(build("llama"), tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ModelError, match=r"model\.gguf cannot be read as GGUF"):
        convert(tmp_path / "model.gguf", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_another_family_is_refused(tmp_path: Path) -> None:
    write(build("llama"), tmp_path / "model.gguf", family="qwen2")
    with pytest.raises(ModelError, match="qwen2"):
        convert(tmp_path / "model.gguf", tmp_path / "converted")
