"""The outputs of the step: the Hugging Face folder, and the facts in its card and nudge.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from nudge.components.common.artifacts.chat_facts import ChatFacts
from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.artifacts.tokens import Tokens
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.provenance import code_version
from nudge.components.common.models.end_of_document import end_of_document_id
from nudge.components.common.models.registered import split_pin
from nudge.components.common.spending.usage import NOTHING, usage_of
from nudge.components.train.models.adapt import lora_config
from nudge.components.train.models.model import Start
from nudge.components.train.models.network import Network
from nudge.components.train.models.quantized import parameter_count
from nudge.components.train.output.card import model_card
from nudge.components.train.output.chat_model import check_folder, end_turns
from nudge.components.train.output.export import finish_export
from nudge.components.train.output.exported_weights import (
    adapter_tensors,
    write_config,
    write_weights,
)
from nudge.components.train.settings import TrainSettings


def facts_of(
    settings: TrainSettings, manifest: Tokens, start: Start, network: Network
) -> dict[str, Any]:
    """The facts known before training: origins, settings and sizes. ``manifest`` is the tokens'."""
    trained = [p for p in network.model.parameters() if p.requires_grad]
    return {
        "base_model": {"uri": split_pin(settings.base_model)[0], "sha256": start.sha256},
        "data_fingerprint": manifest.corpus_fingerprint,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "chat": dataclasses.asdict(manifest.chat) if manifest.chat else None,
        "settings": dataclasses.asdict(settings),
        "seed": settings.seed,
        "code_version": code_version(),
        "training": {
            "mode": settings.mode,
            "parameters": parameter_count(network.model),
            "trainable_parameters": sum(p.numel() for p in trained),
            "decayed_parameters": sum(p.numel() for p in trained if p.dim() >= 2),
            "device": _device(network.ranks.device),
        },
    }


def write_model(
    folder: Path,
    start: Start,
    network: Network,
    settings: TrainSettings,
    tokenizer: Any,
    facts: dict[str, Any],
) -> None:
    """Save the trained model in ``folder``, where transformers and vLLM can load it.

    LoRA also saves the adapter, in ``adapter/``. Every rank must call this; the main rank writes.
    """
    dtype = write_weights(folder, network, start, settings)
    adapter_state = adapter_tensors(network) if settings.mode == "lora" else {}
    if not network.ranks.main:
        return
    chat = parse_chat(facts)
    if chat is not None:
        end_turns(network.model, chat)
    write_config(folder, network.model, dtype)
    tokenizer.save_pretrained(folder)
    if settings.mode == "lora":
        from safetensors.torch import save_file

        adapter = folder / "adapter"
        config = lora_config(settings)
        config.base_model_name_or_path = split_pin(settings.base_model)[0]
        config.save_pretrained(adapter)
        save_file(adapter_state, adapter / "adapter_model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    finish_export(folder, _end_of_document(tokenizer))
    if chat is not None:
        check_folder(folder, chat)


def parse_chat(facts: dict[str, Any]) -> ChatFacts | None:
    """How conversations became text, from the facts of `facts_of`."""
    return ChatFacts(**facts["chat"]) if facts.get("chat") else None


def results(model: Path, history: Path) -> dict[str, Any]:
    """The step's summary figures, read from its finished outputs."""
    training = read_model_facts(model).training
    used = usage_of(training.usage) or NOTHING
    lines = (history / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line) for line in lines]
    losses = [value["loss"] for value in values if "loss" in value]
    validation = [value["validation_loss"] for value in values if "validation_loss" in value]
    return {
        "steps": training.steps,
        "tokens": training.tokens,
        "loss": losses[-1],
        "validation_loss": validation[-1],
        "tokens_per_s": training.tokens_per_s,
        "core_hours": used.core_hours,
        "gpu_hours": used.gpu_hours,
    }


def _end_of_document(tokenizer: Any) -> int | None:
    try:
        return end_of_document_id(tokenizer)
    except UserError:  # the tokens have no end either
        return None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
