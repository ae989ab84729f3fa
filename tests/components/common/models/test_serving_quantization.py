"""Quantized folders: their bytes, what transformers reads from them, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_tree
from nudge.components.common.models import language_model
from nudge.components.common.models.base_model import local_model
from nudge.components.common.models.gguf_file import write_gguf
from nudge.components.common.models.language_model import load_model, speed_up_products
from nudge.components.common.models.loading import meta_model, model_config
from nudge.components.common.models.serving_quantization import (
    Kind,
    quantizable_layers,
    quantization_of,
    quantize_folder,
)
from nudge.components.common.models.weights import WeightFiles
from tests.components.common.models.test_loading import LLAMA, SHAPES

KINDS: tuple[Kind, ...] = get_args(Kind)
IDS = torch.arange(40)[None] % 96
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 whose weights are in several files."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **LLAMA)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0.0  # its scale must not be zero
    model.save_pretrained(folder, max_shard_size="20KB")
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2
    for path in files:
        path.chmod(0o644)  # as training leaves them; safetensors makes them 0600
    return folder


def quantized(base: Path, folder: Path, kind: Kind) -> Path:
    shutil.copytree(base, folder)
    quantize_folder(folder, meta_model(model_config(folder)), kind)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits.float()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_is_smaller_and_predicts_nearly_the_same(
    base: Path, tmp_path: Path, kind: Kind
) -> None:
    folder = quantized(base, tmp_path / kind, kind)
    ours, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert ours.get_submodule(UP).weight.dtype == torch.float32  # ready for calls of its parts
    assert torch.equal(logits(ours), logits(theirs))
    before = logits(load_model(base))
    differs = (logits(ours) - before).abs().max() / before.std()
    assert 0 < differs < {"fp8": 0.3, "int8": 0.1, "int4": 0.8}[kind]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(folder).keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors(folder).values())
    assert WeightFiles(folder).bytes < 0.8 * WeightFiles(base).bytes
    for path in folder.glob("*.safetensors"):
        assert path.stat().st_mode == (base / path.name).stat().st_mode
    again = quantized(base, tmp_path / "again", kind)
    assert sha256_tree(again) == sha256_tree(folder)


def test_the_codes_are_those_of_the_scheme(base: Path, tmp_path: Path) -> None:
    """Symmetric rounding to the nearest code, with the largest weight of a row at its end."""
    weight = tensors(base)[f"{UP}.weight"].float()
    folder = tensors(quantized(base, tmp_path / "int8", "int8"))
    codes, scale = folder[f"{UP}.weight"], folder[f"{UP}.weight_scale"]
    assert codes.dtype == torch.int8
    assert (scale.dtype, scale.shape) == (torch.float32, (len(weight), 1))
    expected = weight.abs().amax(1, keepdim=True) / 127.5
    assert torch.allclose(scale[4:], expected[4:])
    assert ((codes * scale - weight).abs() <= scale * 0.501).all()
    assert (codes[3] == 0).all()
    folder = tensors(quantized(base, tmp_path / "fp8", "fp8"))
    assert folder[f"{UP}.weight"].dtype == torch.float8_e4m3fn
    found = folder[f"{UP}.weight"].float() * folder[f"{UP}.weight_scale"]
    assert torch.allclose(found, weight, rtol=1 / 15, atol=1e-4)  # three bits of mantissa
    folder = tensors(quantized(base, tmp_path / "int4", "int4"))
    assert folder[f"{UP}.weight_packed"].shape == (64, 32 * 4 // 32)
    scale = folder[f"{UP}.weight_scale"]
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (64, 1))  # one group of 32 columns
    found = load_model(tmp_path / "int4").get_submodule(UP).weight
    assert ((found - weight).abs() <= scale.float() * 0.55).all()
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(folder[name], tensors(base)[name])


def test_int4_takes_the_largest_group_that_divides_all_layers(tmp_path: Path) -> None:
    for hidden, inner, group in ((128, 256, 128), (128, 192, 64), (32, 256, 32)):
        shape = {**LLAMA, "hidden_size": hidden, "intermediate_size": inner}
        folder = tmp_path / f"{hidden}-{inner}"
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
        model.save_pretrained(folder)
        quantize_folder(folder, model, "int4")
        groups = quantization_of(folder)["config_groups"]
        assert groups["group_0"]["weights"]["group_size"] == group


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_activations_are_rounded_as_when_served(
    base: Path, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CompressedTensorsConfig

    folder = quantized(base, tmp_path / kind, kind)
    found = logits(load_model(folder))
    only_weights = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert not torch.allclose(found, logits(only_weights), rtol=1e-4)
    monkeypatch.setattr(language_model, "onednn_is_faster", lambda: True)
    model = load_model(folder)
    speed_up_products(model)
    assert torch.equal(logits(model), found)


def test_a_quantized_model_is_no_base_but_may_be_the_served_one(base: Path, tmp_path: Path) -> None:
    folder = quantized(base, tmp_path / "int8", "int8")
    with pytest.raises(UserError, match=r"is quantized \(compressed-tensors\), and quantized weig"):
        local_model(str(folder))
    assert local_model(str(folder), trained=False) == folder
    before = sha256_tree(folder)
    with pytest.raises(UserError, match="is already quantized"):
        quantize_folder(folder, meta_model(model_config(base)), "int4")
    with pytest.raises(UserError, match="quantized for serving, and nudge cannot write that as GG"):
        write_gguf(folder, tmp_path / "a.gguf")
    assert sha256_tree(folder) == before


def test_another_format_and_a_damaged_file_are_refused(base: Path, tmp_path: Path) -> None:
    folder = quantized(base, tmp_path / "int8", "int8")
    next(folder.glob("*-00002-*")).write_bytes(b"nothing")
    with pytest.raises(UserError, match="truncated or damaged"):
        load_model(folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="quantized with gptq; nudge reads only compressed-tensors"):
        load_model(folder)


@pytest.mark.parametrize(
    ("shape", "changes", "kind", "message"),
    [
        ("mixtral", {}, "fp8", "has weights outside of linear layers, in model.layers.0.mlp"),
        ("gpt2", {}, "int8", "GPT2LMHeadModel has no linear layers besides its head"),
        ("llama", {"intermediate_size": 48}, "int4", r"mlp.down_proj has 48 columns, which no gro"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    shape: str, changes: dict[str, int], kind: Kind, message: str
) -> None:
    config = AutoConfig.for_model(shape, **{**SHAPES[shape], **changes})
    with pytest.raises(UserError, match=message):
        quantizable_layers(meta_model(config), kind)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = meta_model(AutoConfig.for_model("llama", **LLAMA))
    with pytest.raises(UserError, match="needs the Python package compressed-tensors"):
        quantizable_layers(model, "fp8")
