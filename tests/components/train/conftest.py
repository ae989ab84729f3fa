"""A small tokens artifact with the tiny model's tokenizer, and a way to train on it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from nudge.components.common.artifacts.tokens import token_dtype
from nudge.components.common.core.publish import sha256_tree
from nudge.components.train.settings import TrainSettings
from tests.components.train import spied_rank
from tests.token_shards import write_shard

SMALL: dict[str, Any] = {
    "sequence_length": 16, "batch_sequences": 4, "micro_batch_sequences": 2, "max_steps": 12,
    "learning_rate": 3e-3, "threads": 1, "validation_every": 4, "checkpoint_every": 3,
    "epochs": 9.0,
}  # fmt: skip


def write_tokens(folder: Path, tiny_model: Path, documents: int = 40) -> Path:
    """Write documents in which a token mostly predicts the next, so there is much to learn."""
    random = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "tokenizer")
    splits = {}
    for split, count in (("train", documents), ("validation", 6)):
        encoded = [
            np.append((random.integers(1, 250) + 3 * np.arange(n)) % 250 + 3, 0)
            for n in random.integers(3, 40, count)
        ]
        path = folder / f"{split}.bin"
        write_shard(path, encoded, token_dtype(300))
        digest = sha256(path.read_bytes()).hexdigest()
        splits[split] = {"shards": [{"file": path.name, "sha256": digest}]}
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_model))
    manifest = {
        "format": "nudge.tokens", "version": 1, "end_of_document_id": 0, "vocab_size": vocabulary,
        "corpus_fingerprint": "c" * 64, "splits": splits,
        "tokenizer_sha256": sha256_tree(folder / "tokenizer"),
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"), tiny_model)


@pytest.fixture
def small(tiny_model: Path) -> Callable[..., TrainSettings]:
    """Settings for a run of twelve steps on the tiny model."""

    def make(**values: object) -> TrainSettings:
        return TrainSettings(**{"base_model": str(tiny_model), **SMALL, **values})  # type: ignore[arg-type]

    return make


def outputs(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in ("model", "history", "report")}


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def lines(folder: Path, kind: str = "loss") -> list[float]:
    values = map(json.loads, (folder / "history" / "metrics.jsonl").read_text().splitlines())
    return [value[kind] for value in values if kind in value]


def command(
    recipe: Path, tokens: Path, folder: Path, ranks: int = 0, module: str = "nudge.components.train"
) -> list[str]:
    """The command line that trains in a separate process, or in ``ranks`` of them."""
    torchrun = [
        *("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"),
    ]
    return [
        *(sys.executable, "-m", *(torchrun if ranks else []), module),
        *("--recipe", recipe.as_uri(), "--tokens", str(tokens)),
        *(word for name, path in outputs(folder).items() for word in (f"--{name}", str(path))),
    ]


def write_recipe(path: Path, settings: TrainSettings) -> Path:
    import dataclasses

    path.write_text(json.dumps({"train": dataclasses.asdict(settings)}))
    return path


def run(
    settings: TrainSettings, tokens: Path, folder: Path, ranks: int = 0, rows: Path | None = None
) -> str:
    """Train in separate processes, which write their rows to the folder ``rows`` if it is not None;
    return their stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(folder / "recipe.json", settings)
    module = "tests.components.train.spied_rank" if rows else "nudge.components.train"
    done = subprocess.run(
        command(recipe, tokens, folder, ranks, module),
        env={**os.environ, **spied_rank.environment(rows)} if rows else None,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
