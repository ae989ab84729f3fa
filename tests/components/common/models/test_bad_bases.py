"""Every layout of a base model that cannot be used is refused with a sentence that names it."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nudge.components.common.core.errors import UserError
from nudge.components.common.models import base_checks
from nudge.components.common.models.base_model import local_model, local_tokenizer, open_tokenizer
from nudge.components.common.models.language_model import load_model

Change = Callable[[Path], object]


def config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def wrote(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def only(name: str, content: bytes) -> Change:
    """A tokenizer that is only this file."""

    def change(folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        (folder / name).write_bytes(content)

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def changed(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return changed


def adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/tower"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {NORM: "model-1.safetensors", "a": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.layers.1.input_layernorm.weight"
TIKTOKEN = b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(256))
LAYOUTS: dict[str, tuple[Change, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (wrote("config.json", b"{"), "config.json cannot be read"),
    "config is no text": (wrote("config.json", b"\xff\xfe\x00"), "config.json cannot be read"),
    "config is a list": (wrote("config.json", b"[]"), "config.json is a JSON list"),
    "config of nothing": (wrote("config.json", b"{}"), "config.json cannot be read"),
    "unknown type": (config(model_type="tower"), "config.json cannot be read"),
    "two pad tokens": (config(pad_token_id=[2, 1]), "config.json cannot be read"),
    "layers as text": (config(num_hidden_layers="two"), "config.json cannot be read"),
    "an encoder": (config(architectures=["BertModel"]), "not a causal language model"),
    "architectures of null": (config(architectures=[None]), "not a causal language model"),
    "gptq": (config(quantization_config={"quant_method": "gptq"}), r"is quantized \(gptq\)"),
    "awq": (config(quantization_config={"quant_method": "awq"}), r"is quantized \(awq\)"),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"is quantized \(bitsandbytes\)",
    ),
    "compressed-tensors": (
        config(quantization_config={"quant_method": "compressed-tensors"}),
        r"is quantized \(compressed-tensors\)",
    ),
    "only an adapter": (adapter, "is only an adapter of owner/tower; merge it"),
    "only a pickle": (pickled, r"has no \.safetensors \(pickles are refused\)"),
    "damaged weights": (wrote("model.safetensors", b"\x10\x00"), "cannot be loaded"),
    "a weight is missing": (weights(lambda s: s.pop(NORM)), f"lacks 1 of the weights.*{NORM}"),
    "a weight of another size": (
        weights(lambda s: s.update({NORM: torch.zeros(3)})),
        "cannot be loaded",
    ),
    "a missing shard": (
        sharded,
        "model.safetensors.index.json names model-2.safetensors, which is missing",
    ),
    "no tokenizer": (only("other.txt", b""), "has no tokenizer.json"),
    "SentencePiece": (
        only("tokenizer.model", b"\n\x0e\n\x05<unk>"),
        "has only a SentencePiece tokenizer",
    ),
    "tiktoken": (only("tokenizer.model", TIKTOKEN), r"has only a tiktoken tokenizer"),
    "qwen.tiktoken": (only("qwen.tiktoken", TIKTOKEN), r"tiktoken tokenizer \(qwen\.tiktoken\)"),
    "damaged tokenizer": (wrote("tokenizer.json", b"{}"), "its tokenizer cannot be loaded"),
    "a template that is no text": (
        wrote("chat_template.jinja", b"\xff\xfe{{ messages }}"),
        r"the chat template .*chat_template\.jinja is not UTF-8 text",
    ),
    "damaged tokenizer config": (
        wrote("tokenizer_config.json", b"["),
        "its tokenizer cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_base_that_cannot_be_used_is_refused_by_name(
    name: str, tmp_path: Path, tiny_model: Path
) -> None:
    change, message = LAYOUTS[name]
    folder = tmp_path / "tower"
    shutil.copytree(tiny_model, folder)
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(local_tokenizer(str(folder)), str(folder))
        local_model(str(folder))
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_added_tokens_without_embeddings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    base_checks.check_vocabulary(tmp_path, "x", 300)
    with pytest.raises(UserError, match="303 tokens, but the model has embeddings for 300; resize"):
        base_checks.check_vocabulary(tmp_path, "x", 303)


LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
NEOX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
DEFAULT = [name.rpartition(".")[2] for name in LLAMA]


def blocks(*kinds: tuple[str, ...], prefix: str = "model.layers") -> list[str]:
    return [f"{prefix}.{n}.{name}" for n, kind in enumerate(kinds) for name in kind]


@pytest.mark.parametrize(
    ("modules", "targets", "message"),
    [
        (blocks(LLAMA, LLAMA), DEFAULT, ""),
        (blocks(LLAMA, LLAMA), ["self_attn.q_proj", "v_proj"], ""),
        (
            blocks(PHI3, PHI3),
            DEFAULT,
            "has no q_proj, k_proj, v_proj, gate_proj, up_proj; the linear layers of its blocks "
            "are down_proj, gate_up_proj, o_proj, qkv_proj; set train.lora_targets",
        ),
        (blocks(PHI3, PHI3), ["qkv_proj", "gate_up_proj"], ""),
        (
            blocks(NEOX, prefix="gpt_neox.layers"),
            ["all-linear"],
            "has no all-linear; the linear layers of its blocks are dense, dense_4h_to_h",
        ),
        (
            blocks(LLAMA, ("mamba.in_proj",), LLAMA, ("mamba.in_proj",)),
            DEFAULT,
            "none of them is in block 1, 3 of 4; the linear layers of its blocks are ",
        ),
    ],
)
def test_lora_targets_must_be_in_every_block(
    modules: list[str], targets: list[str], message: str
) -> None:
    if not message:
        base_checks.check_lora_targets(modules, targets)
        return
    with pytest.raises(UserError) as caught:
        base_checks.check_lora_targets(modules, targets)
    assert message in str(caught.value)
