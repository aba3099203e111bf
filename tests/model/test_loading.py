"""Models from objects and folders: the right weights, or an error that says what is wrong with which file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, build, expected, generated, prompts_of, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from splitwiser_lab import Engine
from splitwiser_lab.errors import ModelError
from splitwiser_lab.model.loading import load
from splitwiser_lab.model.weights import Weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved llama in one safetensors file."""
    tiny("llama").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def same(weights: Weights, model: PreTrainedModel) -> None:
    state = model.state_dict()
    for name, (_, sources) in weights.config.layout().items():
        assert torch.equal(weights[name], torch.cat([state[source] for source in sources])), name


@pytest.mark.parametrize("name", VARIANTS)
def test_from_an_object(name: str) -> None:
    loaded = load(tiny(name), "cpu", torch.float32)
    same(loaded.weights, tiny(name))
    assert loaded.tokenizer is None
    with pytest.raises(ModelError, match="object"):
        loaded.reference()


@pytest.mark.parametrize("name", VARIANTS)
def test_from_a_folder(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved", "cpu", torch.float32)
    same(loaded.weights, tiny(name))
    assert loaded.tokenizer is None
    assert loaded.folder == tmp_path / "saved"
    same(loaded.weights, loaded.reference())


def test_from_shards(tmp_path: Path) -> None:
    tiny("mistral").save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    same(load(str(tmp_path / "saved"), "cpu", torch.float32).weights, tiny("mistral"))


def test_a_folder_runs_as_the_object_does(folder: Path) -> None:
    prompts = prompts_of(12, 30)
    with Engine.from_pretrained(folder, kv_tokens=1024) as engine:
        assert engine.generate(prompts, 8).tokens == expected("llama", prompts, 8)


def test_other_dtypes_are_converted_while_loading() -> None:
    half = build("llama").to(torch.bfloat16)
    same(load(half, "cpu", torch.float32).weights, build("llama").to(torch.bfloat16).float())


def test_a_model_given_in_half_precision_keeps_its_rounded_frequencies() -> None:
    """`.to(torch.bfloat16)` rounds the buffers, too: far from the start its keys are turned by other angles."""
    half = build("llama").to(torch.bfloat16)
    exact = load(build("llama"), "cpu", torch.float32).config.inv_freq
    assert load(half, "cpu", torch.bfloat16).config.inv_freq != exact
    rounded = half.float()  # which leaves them as they are now
    prompts = prompts_of(100)
    with Engine.from_pretrained(rounded, kv_tokens=1024) as engine:
        assert engine.generate(prompts, 20).tokens == [generated(rounded, prompts[0], 20)]


def test_end_of_sequence_ids_are_those_that_generate_uses(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}), encoding="utf-8")
    assert load(folder, "cpu", torch.float32).config.eos_token_ids == (3, 5)
    model = build("llama")
    model.generation_config.eos_token_id = 9
    assert load(model, "cpu", torch.float32).config.eos_token_ids == (9,)


def test_tokenizer_of_the_folder(folder: Path) -> None:
    words = {"[UNK]": 0, "prefill": 1, "decode": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
    ).save_pretrained(folder)
    with Engine.from_pretrained(folder, kv_tokens=1024) as engine:
        assert engine.tokenize("prefill") == [1]
        assert engine.generate("decode", 3).tokens == engine.generate([2], 3).tokens


def test_checkpoint_without_the_leading_model(folder: Path) -> None:
    """Checkpoints of a bare decoder leave it out."""
    file = folder / "model.safetensors"
    save_file({key.removeprefix("model."): tensor for key, tensor in load_file(file).items()}, file)
    same(load(folder, "cpu", torch.float32).weights, tiny("llama"))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_name_the_file(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ModelError, match=r"model\.safetensors is missing, broken or truncated"):
        load(folder, "cpu", torch.float32)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    tiny("mistral").save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load(tmp_path, "cpu", torch.float32)


@pytest.mark.parametrize("text", ["", '{"weight_map": {"a": ', '{"metadata": {}}'])
def test_broken_index_is_named(tmp_path: Path, text: str) -> None:
    tiny("mistral").save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load(tmp_path, "cpu", torch.float32)


def test_missing_tensor_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        load(folder, "cpu", torch.float32)


@pytest.mark.parametrize("shape", [(48, 81), (47, 80), (49, 80), (80,)])
def test_wrong_shape_is_named(folder: Path, shape: tuple[int, ...]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(shape)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"layers\.0\.(mlp\.down_proj|down)"):
        load(folder, "cpu", torch.float32)


def test_config_of_another_size_is_noticed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 96, "head_dim": 16}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        load(folder, "cpu", torch.float32)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*pickle"):
        load(folder, "cpu", torch.float32)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(folder, "cpu", torch.float32)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path, "cpu", torch.float32)


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "no-such-family"}'])
def test_unreadable_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        load(folder, "cpu", torch.float32)


def test_something_that_is_no_model() -> None:
    with pytest.raises(ModelError, match="dict"):
        load({"weights": 1}, "cpu", torch.float32)
