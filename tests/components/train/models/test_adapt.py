"""LoRA's merged weights equal the trained model, for every supported kind of layer."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import load_model
from nudge.components.train.models.adapt import adapt
from nudge.components.train.models.model import Start
from nudge.components.train.models.network import Network
from nudge.components.train.output.exported_weights import write_config, write_weights
from nudge.components.train.settings import TrainSettings

SHAPES = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "pad_token_id": 0},
    "llama": {
        "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32,
        "intermediate_size": 64, "tie_word_embeddings": True,
    },
}  # fmt: skip


def make(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, **SHAPES[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def settings(*targets: str) -> TrainSettings:
    return TrainSettings(base_model="x", mode="lora", lora_rank=4, lora_targets=[*targets])


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt2", ["c_attn"]),
        ("gpt2", ["attn.c_proj"]),  # square, so that a missing transposition changes no shape
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("llama", ["q_proj", "down_proj"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_merged_model_equals_the_trained_one(
    kind: str, targets: list[str], tmp_path: Path
) -> None:
    lora, base = settings(*targets), make(kind)
    trained = adapt(copy.deepcopy(base), lora).eval()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(12)[None]
    before, after = base.eval()(ids).logits, trained(ids).logits
    assert not torch.allclose(before, after, rtol=1e-2)
    base.save_pretrained(tmp_path / "base")
    start = Start(dataclasses.replace(lora, base_model=str(tmp_path / "base")), None, 60)
    start.empty(1)
    write_weights(tmp_path, Network(trained, lora), start, lora)
    write_config(tmp_path, trained, torch.float32)
    merged = load_model(tmp_path)
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("llama", "embed_tokens", "model.embed_tokens is of type Embedding"),
        ("gpt2", "wpe", "transformer.wpe is of type Embedding"),
        ("llama", "lm_head", "lm_head is the output head"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_targets_that_cannot_be_merged_are_rejected_at_the_start(
    kind: str, target: str, message: str
) -> None:
    with pytest.raises(
        UserError, match=rf"lora_targets = \['{target}'\]: {message}; choose linear"
    ):
        adapt(make(kind), settings(target))
