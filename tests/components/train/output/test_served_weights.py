"""Training writes quantized weights, and says what they saved and what they cost."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nudge.components.common.artifacts.model import ServedWeights, read_model_facts
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import model_sha256
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.common.models.serving_quantization import Kind, quantization_of
from nudge.components.common.models.weights import WeightFiles
from nudge.components.train.data import IGNORED, PackedSplit
from nudge.components.train.settings import TrainSettings, train_settings
from nudge.components.train.train import train
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from tests.components.train.conftest import lines, outputs

Small = Callable[..., TrainSettings]


@torch.no_grad()
def bits_per_byte(model: Path, tokens: Path, settings: TrainSettings) -> float:
    """From the logits of each document of the validation rows by itself."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    split = PackedSplit(tokens, "validation", settings.sequence_length, settings.seed)
    rows = split.batch(0, 0, min(settings.validation_sequences, split.rows))
    nats, size = 0.0, 0
    for ids, targets, positions in zip(rows.inputs, rows.targets, rows.positions, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for first, last in itertools.pairwise(starts):
            out = loaded(input_ids=ids[None, first:last]).logits[0]
            nats += torch.nn.functional.cross_entropy(
                out, targets[first:last], ignore_index=IGNORED, reduction="sum"
            ).item()
        size += len(tokenizer.decode(targets[targets != IGNORED].tolist()).encode())
    return nats / math.log(2) / size


@pytest.mark.parametrize(
    ("mode", "kind"), [("full", "fp8"), ("full", "int8"), ("full", "int4"), ("lora", "int8")]
)
def test_the_model_is_quantized_and_the_report_says_what_that_costs(
    small: Small, tokens: Path, tmp_path: Path, mode: str, kind: Kind
) -> None:
    plain = small(mode=mode, prefix_share=0.0)
    train(plain, tokens=tokens, **outputs(tmp_path / "plain"))
    train(
        small(mode=mode, prefix_share=0.0, quantize=kind),
        tokens=tokens,
        **outputs(tmp_path / "served"),
    )
    before, folder = tmp_path / "plain" / "model", tmp_path / "served" / "model"
    assert lines(tmp_path / "served") == lines(tmp_path / "plain")
    assert quantization_of(folder)["quant_method"] == "compressed-tensors"
    facts = read_model_facts(folder)
    served = facts.training.served
    assert served is not None
    assert facts.weights_sha256 == model_sha256(folder)
    assert read_model_facts(before).training.served is None
    assert served.kind == kind
    assert served.bytes_before == WeightFiles(before).bytes
    assert served.bytes_after == WeightFiles(folder).bytes < served.bytes_before
    found = [bits_per_byte(each, tokens, plain) for each in (before, folder)]
    assert [served.bits_per_byte_before, served.bits_per_byte_after] == pytest.approx(found, 1e-4)
    assert served.bits_per_byte_after != served.bits_per_byte_before
    page = (tmp_path / "served" / "report").read_text()
    saved = served.bytes_before - served.bytes_after
    assert f"{saved:,} of {served.bytes_before:,} bytes" in page
    lost = served.bits_per_byte_after - served.bits_per_byte_before
    assert f"{lost:+.4f} bits per byte of held-out text" in page
    assert (folder / "adapter").is_dir() == (mode == "lora")


@pytest.mark.long
def test_ranks_write_the_same_quantized_model(small: Small, tokens: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        train(small(quantize="int8", processes=ranks), tokens=tokens, **outputs(folder))
        found.append(read_model_facts(folder / "model").training.served)
    one, two = found
    assert isinstance(one, ServedWeights)
    assert isinstance(two, ServedWeights)
    assert two.bytes_after == one.bytes_after
    assert two.bits_per_byte_after == pytest.approx(one.bits_per_byte_after, rel=1e-3)


def test_an_architecture_that_cannot_be_quantized_is_refused_before_training(
    tokens: Path, tmp_path: Path
) -> None:
    shape = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    settings = TrainSettings(mode="scratch", model_config=shape, quantize="fp8", sequence_length=16)
    with pytest.raises(UserError, match="has no linear layers besides its head"):
        train(settings, tokens=tokens, **outputs(tmp_path))
    assert not (tmp_path / "history").exists()


def test_training_follows_the_setting_of_upload() -> None:
    recipe = "base_model: x\nupload: {model_name: m, quantize: int4}\n"
    assert train_settings(recipe).quantize == "int4"
    assert train_settings(recipe + "train: {quantize: fp8}\n").quantize == "fp8"
    assert train_settings(recipe + "train: {quantize: null}\n").quantize is None
    assert train_settings("base_model: x").quantize is None


@pytest.mark.parametrize("otherwise", ["", "?else=hf://owner/name"])
def test_a_quantized_model_cannot_be_its_own_next_base(otherwise: str) -> None:
    recipe = f"base_model: incumbent://m{otherwise}\nmodel_name: m\nupload: {{quantize: int4}}\n"
    with pytest.raises(UserError, match="would train it further, which is not possible"):
        train_settings(recipe)
    assert train_settings(recipe.replace("int4", "null")).quantize is None
    assert train_settings(recipe.replace("model_name: m", "model_name: n")).quantize == "int4"


def test_upload_refuses_a_model_that_is_not_quantized_as_the_settings_say(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    train(small(max_steps=1, quantize="int8"), tokens=tokens, **outputs(tmp_path))
    settings = UploadSettings(model_name="m", target="s3://nowhere", quantize="fp8")
    with pytest.raises(UserError, match="was quantized to int8 when it was trained; train it ag"):
        upload(settings, model=tmp_path / "model", version="v1")
    path = tmp_path / "model" / "nudge.json"
    values = json.loads(path.read_text())
    del values["training"]["served"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="was not quantized when it was trained"):
        upload(settings, model=tmp_path / "model", version="v1")
