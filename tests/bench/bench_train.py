"""Trains SmolLM2-135M with nudge and with Hugging Face's Trainer: same rows, batches and precision.

    python -m tests.bench.bench_train [--steps 4] [--batch 8] [--rounds 3] [--only text|chat]

The sides take turns, each in a separate process, and their speed excludes the first step. Memory is
the peak of the process until the end of its last step. Both read the Python language reference,
packed into rows of 256 tokens with separate positions for each document. A third side writes a
checkpoint after every second step; its additional time is the cost of checkpoints. The case `chat`
trains on conversations, beside TRL (see `chat_training`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from nudge.components.common.models.base_model import local_model
from nudge.components.common.models.end_of_document import end_of_document_id
from nudge.components.common.models.language_model import load_tokenizer
from nudge.components.train.data import IGNORED, PackedSplit
from nudge.components.train.meter import memory_bytes
from nudge.components.train.settings import TrainSettings
from tests.bench import chat_training
from tests.bench.results import Measure, processor, publish
from tests.bench.training import (
    BASE,
    LENGTH,
    Run,
    Watch,
    model_and_optimizers,
    ours,
    settings,
    write_artifact,
)

PEER = "Hugging Face Trainer"
PACKAGES = ("torch", "transformers", "accelerate", "trl", "datasets")
INTERVAL = 50
"""Steps between checkpoints in the reported share of time."""
SIDES = ("ours", "peer", "saving")
SPINNING = {"GOMP_SPINCOUNT": "300000"}


def write_tokens(folder: Path) -> None:
    """Write the language reference as a tokens artifact; the first topic is for validation."""
    from pydoc_data.topics import topics

    tokenizer = load_tokenizer(local_model(BASE))
    end = end_of_document_id(tokenizer)
    documents = [
        np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], end])
        for text in topics.values()
    ]
    splits = {"train": (documents[1:], None), "validation": (documents[:1], None)}
    write_artifact(folder, tokenizer, splits)


def peer(tokens: Path, chosen: TrainSettings) -> Run:
    """Train with Hugging Face's Trainer, on the same rows in the same order."""
    rows = PackedSplit(tokens, "train", LENGTH, chosen.seed).batch(
        0, 0, chosen.max_steps * chosen.batch_sequences
    )
    examples = [
        {"input_ids": i, "labels": t, "shift_labels": t, "position_ids": p}
        for i, t, p in zip(rows.inputs, rows.targets, rows.positions, strict=True)
    ]

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

    model, optimizers = model_and_optimizers(chosen)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=chosen.max_steps, use_cpu=True,
            per_device_train_batch_size=chosen.micro_batch_sequences,
            gradient_accumulation_steps=chosen.batch_sequences // chosen.micro_batch_sequences,
            max_grad_norm=chosen.clip_norm, save_strategy="no", report_to="none", logging_steps=1,
            disable_tqdm=True, remove_unused_columns=False, seed=chosen.seed,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=examples, callbacks=[watch],
            optimizers=optimizers,
        )  # fmt: skip
        trainer.train()
    counts = (rows.targets.view(chosen.max_steps, -1) != IGNORED).sum(1).cumsum(0)
    peak = memory_bytes(torch.device("cpu"))
    seconds, losses = watch.seconds, watch.losses
    return {"seconds": seconds, "losses": losses, "tokens": counts.tolist(), "bytes": peak}


def one_side(side: str, tokens: Path, steps: int, batch: int) -> Run:
    """Train as one of `SIDES` or `chat_training.SIDES`, in this process."""
    if side in chat_training.SIDES:
        return chat_training.one_side(side, tokens, steps, batch)
    rows = {"micro_batch_sequences": min(batch, 4)}
    if side == "peer":
        return peer(tokens, settings(steps, batch, **rows))
    with tempfile.TemporaryDirectory() as folder:
        saving = {"checkpoints": folder, "checkpoint_every": 2, "resume": "never"}
        return ours(tokens, settings(steps, batch, **rows, **saving if side == "saving" else {}))


def in_process(side: str, tokens: Path, steps: int, batch: int) -> Run:
    """Train one side in a separate process. For the peer, OpenMP threads spin as by default, which
    nudge changes for its own process."""
    line = [sys.executable, "-m", "tests.bench.bench_train", "--side", side, "--tokens", tokens]
    waiting = {} if side in ("ours", "saving") or side.startswith("ours ") else SPINNING
    done = subprocess.run(
        [*map(str, line), "--steps", str(steps), "--batch", str(batch)],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **waiting},
    )  # fmt: skip
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


def all_runs(
    sides: tuple[str, ...], write: Callable[[Path], None], given: argparse.Namespace
) -> dict[str, list[Run]]:
    """The runs of each side; the sides take turns."""
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for _ in range(given.rounds):
            for side, kept in runs.items():
                kept.append(in_process(side, Path(folder), given.steps, given.batch))
    return runs


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
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    for name, default in (("steps", 4), ("batch", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("text", "chat"))
    given = parser.parse_args()
    if given.side:
        print(json.dumps(one_side(given.side, given.tokens, given.steps, given.batch)))
        return
    measures: list[Measure] = []
    if given.only != "chat":
        runs = all_runs(SIDES, write_tokens, given)
        measures += compare(runs, given.steps, given.batch)
    if given.only != "text":
        measures += chat_training.unmeasured(given.batch) or chat_training.compare(
            all_runs(chat_training.SIDES, chat_training.write_tokens, given), given.batch
        )
    publish("train", measures, PACKAGES, processor())


if __name__ == "__main__":
    main()
