"""`nudge export`: what is written loads elsewhere and predicts the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from nudge.components.common.core.errors import UserError
from nudge.components.common.models import gguf_file
from nudge.components.common.models.gguf_file import write_gguf
from nudge.pipelines.cli.export import write


def made(folder: Path, tiny_model: Path, kind: type, dtype: torch.dtype) -> Path:
    """A model with the tiny model's tokenizer, and weights large enough to prefer tokens."""
    shutil.copytree(tiny_model, folder)
    rows = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    torch.manual_seed(2)
    config = kind(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(LlamaConfig, torch.bfloat16), (LlamaConfig, torch.float32), (Qwen3Config, torch.bfloat16)],
)
def test_a_gguf_file_predicts_what_the_folder_does(
    kind: type, dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path / "model", tiny_model, kind, dtype)
    write(folder, tmp_path / "out", "gguf", "mine-v1")
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "mine-v1.gguf"
    again = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("Paris is located in")["input_ids"]])
    one, two = (model.eval()(ids).logits.softmax(-1) for model in (there, again))
    assert float(one.max()) > 0.1
    assert float((one - two).abs().max()) < 0.02


def test_a_wrong_gguf_file_is_not_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "model", tiny_model, LlamaConfig, torch.float32)
    monkeypatch.setattr(gguf_file, "_permuted", lambda name, tensor, config: tensor)
    with pytest.raises(UserError, match=r"differ by 0\.\d+ .*at most 0.02 is accepted"):
        write_gguf(folder, tmp_path / "a.gguf")
    assert list(tmp_path.glob("*.gguf*")) == list(tmp_path.glob(".*gguf*")) == []


def test_what_gguf_cannot_hold_is_said_first(tiny_model: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", tiny_model, LlamaConfig, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"scales its rotary positions \(linear\)"):
        write_gguf(folder, tmp_path / "a.gguf")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is a gpt2 model, .* it can write llama, mistral"):
        write_gguf(folder, tmp_path / "a.gguf")


def test_folders_and_adapters_are_copied(tiny_model: Path, tmp_path: Path) -> None:
    assert "files" in write(tiny_model, tmp_path / "hf", "hf", "mine-v1")
    there = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert there == (tiny_model / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="mine-v1 has no adapter, because"):
        write(tiny_model, tmp_path / "adapter", "adapter", "mine-v1")
    folder = shutil.copytree(tiny_model, tmp_path / "lora")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    write(folder, tmp_path / "adapter", "adapter", "mine-v1")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter_config.json"]
