"""Loss and logits of each architecture agree; a tokenizer appends nothing to a prompt."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import (
    check_generates,
    check_loss,
    load_model,
    load_tokenizer,
)
from nudge.components.evaluate import perplexity
from nudge.components.train.data import Rows
from nudge.components.train.models.network import Network
from nudge.components.train.settings import TrainSettings

LENGTH = 20
ARCHITECTURES = {
    "llama": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "cohere": {"logit_scale": 0.0625},
    "phi": {},
}


def make(kind: str, **values: Any) -> Any:
    """A model with large weights and biases, so that every omission shows."""
    shape = {
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_loss_equals_that_of_transformers(kind: str) -> None:
    model = make(kind, **ARCHITECTURES[kind])
    ids = torch.randint(3, 200, (2, LENGTH + 1))
    reference = model(input_ids=ids, labels=ids, use_cache=False).loss
    check_loss(model)
    expected = torch.autograd.grad(reference * 2 * LENGTH, list(model.parameters()))

    inputs, targets = ids[:, :-1], ids[:, 1:].contiguous()
    rows = Rows(inputs, targets, torch.arange(LENGTH).repeat(2, 1))
    summed = Network(model, TrainSettings(base_model="x")).summed_loss(rows)
    assert summed.item() / (2 * LENGTH) == pytest.approx(reference.item(), rel=1e-5)
    gradients = torch.autograd.grad(summed, list(model.parameters()))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    with torch.no_grad():
        losses = perplexity._losses(model, inputs, targets, torch.ones_like(targets).bool())
    assert losses.mean().item() == pytest.approx(reference.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_unsupported_logits_is_refused(dtype: torch.dtype) -> None:
    model = make("llama").to(dtype)
    check_loss(model)
    forward = type(model).forward

    def scaled(*arguments: Any, **named: Any) -> Any:
        out = forward(model, *arguments, **named)
        out.logits = out.logits * 0.8
        return out

    model.forward = scaled
    with pytest.raises(UserError, match="^LlamaForCausalLM: the loss of its own logits .* choose"):
        check_loss(model)


def test_the_check_restores_the_training_mode() -> None:
    model = make("llama").train()
    check_loss(model)
    assert model.training


@pytest.mark.parametrize("start", [[], ["<|im_start|>"]], ids=["no_start", "start"])
def test_no_end_token_follows_a_prompt(tiny_model: Path, tmp_path: Path, start: list[str]) -> None:
    """A base whose post-processor appends the end token, as ``add_eos_token`` does."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    base = AutoTokenizer.from_pretrained(folder)
    base.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*start, "$A", "<|im_end|>"],
        special_tokens=[(t, base.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>")],
    )
    base.save_pretrained(folder)
    plain = base("In Paris", add_special_tokens=False)["input_ids"]
    assert base("In Paris")["input_ids"][-1] == base.eos_token_id

    tokenizer = load_tokenizer(folder)
    expected = base.convert_tokens_to_ids(start) + plain
    assert tokenizer("In Paris")["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path / "served")  # as an exported model has it
    served = AutoTokenizer.from_pretrained(tmp_path / "served")
    assert served("In Paris")["input_ids"] == expected


def test_a_base_that_generates_nothing_is_refused_before_training(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    own = model.generation_config
    own.num_beams = 3  # the base's own configuration does not matter
    check_generates(model, tokenizer, "x")
    assert model.generation_config is own
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(300, 7))
    with pytest.raises(UserError, match="base_model x cannot generate a token: mat1 and mat2"):
        check_generates(model, tokenizer, "x")
