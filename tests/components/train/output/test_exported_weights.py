"""The exported folder: several files with an index, the base model's dtype, and other layouts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nudge.components.common.models.language_model import load_model
from nudge.components.train.models.model import Start
from nudge.components.train.models.network import Network
from nudge.components.train.output.exported_weights import export_dtype, write_config, write_weights
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.common.models.test_loading import SHAPES
from tests.components.train.conftest import outputs

Small = Callable[..., TrainSettings]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_several_files_have_the_same_weights_as_one(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    train(small(mode=mode, max_steps=2), tokens=tokens, **outputs(tmp_path / "one"))
    monkeypatch.setattr("nudge.components.train.output.exported_weights.MAX_FILE_BYTES", 30_000)
    train(small(mode=mode, max_steps=2), tokens=tokens, **outputs(tmp_path / "many"))
    folder = tmp_path / "many" / "model"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    expected = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_experts_are_written_as_the_files_of_the_architecture_have_them(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mixtral", **SHAPES["mixtral"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "expected")
    settings = TrainSettings(mode="scratch", model_size="1M")
    start = Start.__new__(Start)
    start.folder = None
    (tmp_path / "written").mkdir()
    write_weights(tmp_path / "written", Network(model, settings), start, settings)
    write_config(tmp_path / "written", model, torch.float32)
    there, here = (
        load_file(tmp_path / name / "model.safetensors") for name in ("expected", "written")
    )
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert any("experts.3." in name for name in here)
    loaded = load_model(tmp_path / "written")
    assert torch.equal(
        loaded(torch.arange(5)[None]).logits, model.eval()(torch.arange(5)[None]).logits
    )


def test_auto_writes_the_dtype_of_the_base_model(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    settings = small(mode="lora", max_steps=2)
    base = shutil.copytree(settings.base_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(half, base / "model.safetensors", {"format": "pt"})
    train(small(mode="lora", max_steps=2, base_model=str(base)), tokens=tokens, **outputs(tmp_path))
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    untouched = "model.embed_tokens.weight"
    assert torch.equal(written[untouched], half[untouched])


def test_a_gguf_base_is_written_in_bfloat16(small: Small) -> None:
    start = Start(small(), None, 100)
    start.empty(1)
    assert export_dtype(start, small()) == torch.float32
    assert export_dtype(start, small(base_model="package://a/b.Q4_1.gguf")) == torch.bfloat16
    assert export_dtype(start, small(export_dtype="float16")) == torch.float16
