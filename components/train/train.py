"""The step `train`: tokens and a base model in, a Hugging Face model folder out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nudge.components.common.publish import published, write_manifest
from nudge.components.common.step import step
from nudge.components.train.settings import TrainSettings

FORMAT, VERSION = "nudge.model", 1
SPLITS = ("train", "validation")


@step("train", outputs=("model", "history"))
def train(settings: TrainSettings, *, tokens: Path, model: Path, history: Path) -> dict[str, Any]:
    """Train a base model on token shards.

    ``tokens`` is a tokens artifact. ``model`` becomes a Hugging Face folder (config, tokenizer,
    safetensors, model card) with ``nudge.json``, which tells what it was made of. ``history``
    becomes a folder of ``metrics.jsonl`` (a line a step: loss in nats per token, learning rate,
    gradient norm, tokens, seconds; validation losses) and ``probes.jsonl`` (the watched prompt).
    Raises `UserError` on a tokenizer that does not fit the model and on a loss that is not finite.
    """
    from nudge.components.common import language_model
    from nudge.components.common.base_model import local_model, model_sha256
    from nudge.components.common.errors import UserError
    from nudge.components.common.progress import progress
    from nudge.components.common.provenance import code_version
    from nudge.components.common.tokens import read_tokens_manifest
    from nudge.components.train.adapt import adapt, merged_state
    from nudge.components.train.card import model_card
    from nudge.components.train.data import PackedSplit
    from nudge.components.train.loop import planned_steps, train_loop

    manifest = read_tokens_manifest(tokens)
    language_model.set_up_torch(settings.threads, settings.seed)
    length, seed = settings.sequence_length, settings.seed
    split = [
        PackedSplit(tokens, "train", length, seed, settings.prefix_share),
        PackedSplit(tokens, "validation", length, seed),
    ]
    steps = planned_steps(settings, split[0].rows)
    with (
        published(model) as model_part,
        published(history) as history_part,
        progress("train", total=steps, unit="steps") as bar,
    ):
        bar.note(stage="loading the base model")
        base = local_model(settings.base_model)
        tokenizer = language_model.load_tokenizer(tokens / "tokenizer")
        network = language_model.load_model(base)
        rows = language_model.head_weight(network).shape[0]
        if manifest["vocab_size"] > rows:
            raise UserError(
                f"the tokens have a vocabulary of {manifest['vocab_size']}, the model "
                f"{settings.base_model} has {rows}: tokenize again with this base model's tokenizer"
            )
        network = adapt(network, settings)
        bar.note(stage="training")
        done = train_loop(
            network, tokenizer, split[0], split[1], settings, history_part, bar, steps
        )
        bar.note(stage="writing the model")
        trained = [p.numel() for p in network.parameters() if p.requires_grad]
        facts = {
            "base_model": {"uri": settings.base_model, "sha256": model_sha256(base)},
            "data_fingerprint": manifest["corpus_fingerprint"],
            "tokenizer_sha256": manifest["tokenizer_sha256"],
            "tokens": {name: part.tokens for name, part in zip(SPLITS, split, strict=True)},
            "settings": dataclasses.asdict(settings),
            "seed": settings.seed,
            "code_version": code_version(),
            "training": {
                "mode": settings.mode,
                "steps": done.steps,
                "tokens": done.tokens,
                "seconds": done.seconds,
                "tokens_per_s": done.tokens / done.seconds,
                "parameters": sum(p.numel() for p in language_model.load_model(base).parameters()),
                "trainable_parameters": sum(trained),
            },
        }
        _write_model(model_part, base, merged_state(network, settings, base), settings)
        tokenizer.save_pretrained(model_part)
        write_manifest(model_part / "nudge.json", FORMAT, VERSION, facts)
        (model_part / "README.md").write_text(model_card(facts), encoding="utf-8")
    return {"steps": done.steps, "tokens": done.tokens, "loss": _last_loss(history)}


def _write_model(folder: Path, base: Path, state: dict[str, Any], settings: TrainSettings) -> None:
    import torch
    from nudge.components.common.language_model import load_model

    model = load_model(base)
    model.load_state_dict(state)
    model.to(getattr(torch, settings.export_dtype)).save_pretrained(folder)


def _last_loss(history: Path) -> float:
    lines = (history / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float([values for values in map(json.loads, lines) if "loss" in values][-1]["loss"])
