"""A corpus, a base model and a trained candidate, on which tests run the whole step."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nudge.components.common.artifacts.corpus import (
    Document,
    read_corpus,
    write_corpus,
)
from nudge.components.common.artifacts.evaluation import read_evaluation
from nudge.components.common.core.publish import write_manifest
from nudge.components.evaluate.evaluate import evaluate
from nudge.components.evaluate.settings import EvaluateSettings

WORDS = ["the", "tower", "of", "Paris", "stands", "on", "a", "river", "and", "is", "old"]
HELD_OUT = 20
OUTPUTS = ("evaluation", "report", "scores")


def sentences(seed: int, count: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(8, 40))) for _ in range(count)]


def train(folder: Path, texts: list[str]) -> None:
    """A few steps on the texts, enough to beat the base model."""
    from nudge.components.common.models.language_model import load_model, load_tokenizer

    torch.manual_seed(1)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for text in texts:
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@dataclasses.dataclass
class Workspace:
    """A corpus, a base model, a trained candidate, and a folder for the outputs of the step."""

    folder: Path
    base: Path

    def run(
        self, candidate: str = "candidate", corpus: str = "corpus", **changes: Any
    ) -> dict[str, Any]:
        few = {"window": 64, "stride": 32, "resamples": 2000, "guards": [], "prompts": []}
        settings = EvaluateSettings(base_model=str(self.base), **{**few, **changes})
        inputs = {"corpus": corpus, "model": candidate, "history": "history"}
        paths = {key: self.folder / name for key, name in inputs.items()}
        outputs = {name: self.folder / name for name in OUTPUTS}
        evaluate(settings, **paths, **outputs)
        read_evaluation(outputs["evaluation"])
        return dict(json.loads(outputs["evaluation"].read_text(encoding="utf-8")))


def make_corpus(folder: Path, training: list[str], held_out: list[str]) -> None:
    documents = {
        split: [Document(f"{split}-{n}", text, "file://corpus") for n, text in enumerate(texts)]
        for split, texts in {"train": training, "validation": held_out}.items()
    }
    folder.mkdir()
    counts = {"documents_in": 42, "documents": 42, "bytes": 1, "dropped": {}, "sources": []}
    write_corpus(folder, documents, counts)


def make_workspace(folder: Path, tiny_model: Path) -> Workspace:
    training = sentences(1, 30)
    make_corpus(folder / "corpus", training, sentences(2, HELD_OUT))
    (folder / "history").mkdir()
    for name in ("metrics.jsonl", "probes.jsonl"):
        (folder / "history" / name).touch()
    shutil.copytree(tiny_model, folder / "candidate")
    train(folder / "candidate", training)
    facts = dict.fromkeys(("data_fingerprint", "tokenizer_sha256", "code_version"), "")
    body = {
        **facts,
        "data_fingerprint": read_corpus(folder / "corpus").fingerprint,
        "base_model": {"uri": str(tiny_model), "sha256": ""},
        "seed": 1,
        "settings": {},
        "training": {},
        "tokens": {"train": 1, "validation": 1},
    }
    write_manifest(folder / "candidate" / "nudge.json", "nudge.model", 1, body)
    return Workspace(folder, tiny_model)


Say = Callable[..., None]
"""Sets the incumbent that the registry reports, and the folder that was uploaded for it."""
