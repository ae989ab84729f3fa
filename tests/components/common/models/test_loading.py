"""Models are loaded tensor by tensor, with the values and buffers that transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import local_model
from nudge.components.common.models.language_model import load_model
from nudge.components.common.models.weights import WeightFiles

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64,
       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},  # its table of sines is a buffer that no file contains
    "gemma3_text": {**LLAMA, "head_dim": 8},  # its embedding scale is a buffer
    "mixtral": {**LLAMA, "num_local_experts": 4},  # files have a tensor per expert, the model one
    "phi3": LLAMA,
}


def write(folder: Path, name: str, max_shard_size: str = "20KB") -> Path:
    config = AutoConfig.for_model(name.split()[0], **SHAPES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_a_loaded_model_is_the_one_that_transformers_loads(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", name)
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = load_model(folder)
    for kind in ("named_parameters", "named_buffers"):
        there, here = dict(getattr(expected, kind)()), dict(getattr(loaded, kind)())
        assert there.keys() == here.keys()
        assert all(torch.equal(there[key], here[key]) for key in there)
        assert all(there[key].dtype == here[key].dtype for key in there)
    assert not loaded.training
    ids = torch.arange(9)[None]
    assert torch.equal(expected(ids).logits, loaded(ids).logits)


def test_the_files_of_a_bare_gpt2_have_no_prefix(tmp_path: Path) -> None:
    """As those of openai-community/gpt2, which were saved without the head."""
    folder = write(tmp_path / "model", "gpt2", "1GB")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(
        load_model(folder).get_input_embeddings().weight, tensors["transformer.wte.weight"]
    )


def test_two_different_tensors_are_not_tied(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama tied", "1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_model(folder)
    assert torch.equal(model.get_output_embeddings().weight, tensors["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
    assert not model.config.tie_word_embeddings


def test_a_large_tensor_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nudge.components.common.models.weights.CHUNK_BYTES", 256)
    tensor = torch.randn(37, 5)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    into = torch.empty(20, 5, dtype=torch.bfloat16)
    WeightFiles(tmp_path).read("a", into, first=11)
    assert torch.equal(into, tensor[11:31].bfloat16())


def damage(folder: Path, how: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, shard = sorted(index["weight_map"].items())[0]
    if how == "missing":
        (folder / shard).unlink()
    elif how == "truncated":
        (folder / shard).write_bytes((folder / shard).read_bytes()[:-10])
    elif how == "elsewhere":
        index["weight_map"][name] = sorted(set(index["weight_map"].values()) - {shard})[0]
    elif how == "outside":
        index["weight_map"][name] = f"../{shard}"
    elif how == "no json":
        (folder / "model.safetensors.index.json").write_text("{")
        return
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"index.json names model-0000\d-of-\d+.safetensors, which is missing"),
        ("truncated", r"model-0000\d-of-\d+.safetensors cannot be loaded: the file is truncated"),
        ("elsewhere", r"places the tensor lm_head.weight in model-0000\d.*does not contain it"),
        ("outside", "which is outside its folder"),
        ("no json", "cannot be read as an index of weights"),
    ],
)
def test_damaged_files_are_named_before_anything_is_loaded(
    tmp_path: Path, how: str, message: str
) -> None:
    folder = write(tmp_path / "model", "llama")
    damage(folder, how)
    with pytest.raises(UserError, match=message):
        local_model(str(folder))


def test_files_that_do_not_fit_the_config_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama", "1GB")
    config = json.loads((folder / "config.json").read_text())
    deeper, wider = ({**config, **{k: v}} for k, v in (("num_hidden_layers", 3), ("vocab_size", 8)))
    for changed, message in (
        (deeper, r"lacks 9 of the weights that its config.json names, such as model.layers.2"),
        (wider, r"has the shape \[96, 32\], but config.json makes it \[8, 32\]"),
    ):
        other = shutil.copytree(folder, tmp_path / f"{len(message)}")
        (other / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load_model(other)
