"""A frozen base in 8 or 4 bits: training, the merged model, ranks, and what it costs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import load_model
from nudge.components.train.models.quantized import QuantizedLinear, dequantized, quantized
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import lines, outputs, run

Small = Callable[..., TrainSettings]


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are wide enough for NF4's blocks of 64 weights."""
    import shutil

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("wide") / "model")
    values = json.loads((folder / "config.json").read_text())
    values |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**values))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("nf4", 0.12)])
def test_rows_are_quantized_one_by_one(kind: str, error: float) -> None:
    weight = torch.randn(10, 128, generator=torch.Generator().manual_seed(1))
    codes, scales = quantized(weight, kind)
    again = dequantized(codes, scales, kind)
    assert float((again - weight).norm() / weight.norm()) < error
    part = dequantized(*quantized(weight[3:7], kind), kind)
    assert torch.equal(part, again[3:7])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_gradient_of_a_quantized_layer_is_that_of_its_dequantized_weight(kind: str) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    linear = nn.Linear(64, 6)
    layer = QuantizedLinear(linear, kind)
    for name in ("codes", "scales"):
        setattr(layer, name, nn.Parameter(layer.from_rows(name, weight), requires_grad=False))
    x, y = (torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
            for _ in range(2))  # fmt: skip
    full = dequantized(layer.codes, layer.scales, kind)
    expected = nn.functional.linear(y, full, linear.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "nf4"])
def test_lora_trains_beside_a_quantized_base_and_merges_into_it(
    kind: str, small: Small, tokens: Path, wide: Path, tmp_path: Path
) -> None:
    settings = small(
        base_model=str(wide), mode="lora", base_dtype=kind, max_steps=30, epochs=99.0,
        learning_rate=1e-2, export_dtype="float32",
    )  # fmt: skip
    train(settings, tokens=tokens, **outputs(tmp_path))
    losses = lines(tmp_path)
    assert losses[-1] < losses[0] - 0.2
    facts = read_model_facts(tmp_path / "model").training
    assert facts.parameters == sum(p.numel() for p in load_model(wide).parameters())
    merged = load_file(tmp_path / "model" / "model.safetensors")
    adapter = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    base = load_file(wide / "model.safetensors")
    stem = "model.layers.1.mlp.up_proj"
    low, high = (adapter[f"base_model.model.{stem}.lora_{part}.weight"] for part in "AB")
    weight = base[f"{stem}.weight"]
    if kind != "bfloat16":
        weight = dequantized(*quantized(weight, kind), kind)
    expected = weight + settings.lora_alpha / settings.lora_rank * (high @ low)
    torch.testing.assert_close(merged[f"{stem}.weight"], expected)
    report = (tmp_path / "report").read_text()
    assert (f"cost of the {kind} base before training" in report) is (kind != "bfloat16")
    if kind != "bfloat16":
        cost = facts.quantized_bits_per_byte - facts.base_bits_per_byte  # type: ignore[operator]
        limits = {"int8": (-0.01, 0.01), "nf4": (-0.2, 0.5)}[kind]
        assert limits[0] < cost < limits[1]
        assert cost != 0
        assert f"{cost:+.4f} bits per byte" in report


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_two_ranks_with_a_quantized_base_have_the_losses_of_one(
    kind: str, small: Small, tokens: Path, wide: Path, tmp_path: Path
) -> None:
    settings = small(base_model=str(wide), mode="lora", base_dtype=kind)
    run(settings, tokens, tmp_path / "two", ranks=2)
    train(settings, tokens=tokens, **outputs(tmp_path / "one"))
    assert lines(tmp_path / "two") == pytest.approx(lines(tmp_path / "one"), rel=1e-3)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors")
                for name in ("one", "two"))  # fmt: skip
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-2, atol=1e-3)


def test_a_base_that_is_already_quantized_is_refused(
    small: Small, tokens: Path, wide: Path, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(wide, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = small(base_model=str(folder), mode="lora", base_dtype="nf4")
    with pytest.raises(UserError, match=r"is quantized \(fp8\), and quantized"):
        train(settings, tokens=tokens, **outputs(tmp_path / "out"))


def test_a_quantized_base_needs_lora(small: Small) -> None:
    with pytest.raises(ValueError, match="base_dtype nf4 needs mode lora"):
        small(base_dtype="nf4")
