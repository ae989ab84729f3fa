"""Trains SmolLM2-135M on conversations with nudge and with TRL's SFTTrainer, for `bench_train`.

Both read the conversations of the shipped recipe `chat` and learn the assistant's turns. TRL gets
the model's template with the marks that it needs for its mask, and its fastest settings: float32
as ours, and no recomputed activations. Packed, both train on as many rows of the same length; TRL's
conversations see each other in them, because without flash attention it has no mask for that.
Unpacked, both train on the same conversations in the same order, so that the losses must agree.
"""

import importlib.util
import itertools
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from nudge.components.common.artifacts.tokens import TokenReader
from nudge.components.common.chat import conversation_of, template_of_folder
from nudge.components.common.chat.masks import Encoder, Masked, Plain
from nudge.components.common.models.base_model import local_model
from nudge.components.common.models.language_model import load_tokenizer
from nudge.components.train.data import IGNORED, PackedSplit
from nudge.components.train.meter import memory_bytes
from nudge.components.train.settings import TrainSettings
from nudge.pipelines import recipes
from tests.bench.bench_chat import marked
from tests.bench.results import Measure
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

PEER = "TRL's SFTTrainer"
SIDES = ("ours packed", "TRL packed", "ours unpacked", "TRL unpacked")


def unmeasured(batch: int) -> list[Measure]:
    """One measure that says which packages of the peer are missing; none if all are there."""
    missing = [name for name in ("datasets", "trl") if importlib.util.find_spec(name) is None]
    if not missing:
        return []
    note = f"unmeasured: {' and '.join(missing)} not installed; run pip install -e '.[bench]'"
    return [Measure(named(batch), "learned tokens/s", None, note=note)]


def named(batch: int) -> str:
    return f"SmolLM2-135M, conversations, {batch} x {LENGTH} tokens, float32"


def conversations() -> list[list[dict[str, str]]]:
    """The conversations of the shipped recipe `chat`."""
    path = Path(recipes.__file__).parent / "corpora" / "library" / "desk.jsonl"
    return [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]


def write_tokens(folder: Path) -> None:
    """Write the conversations as a tokens artifact; the first two are for validation."""
    base = local_model(BASE)
    tokenizer = load_tokenizer(base)
    template = template_of_folder(base)

    def ids_of(texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    encoder = Encoder((base / "tokenizer.json").read_text("utf-8"), ids_of)
    plain = [
        Plain(each)
        for messages in conversations()
        for each in template.render(conversation_of({"messages": messages}))
    ]
    made = [each for each in encoder.encode(plain) if isinstance(each, Masked)]
    assert len(made) == len(plain)
    ids, learned = [each.ids for each in made], [each.learned for each in made]
    splits = {"train": (ids[2:], learned[2:]), "validation": (ids[:2], learned[:2])}
    write_artifact(folder, tokenizer, splits)


def one_side(side: str, tokens: Path, steps: int, batch: int) -> Run:
    """Train as one of `SIDES`, in this process: seconds at the end of each step, losses, learned
    tokens so far, and peak bytes."""
    packing = side.endswith(" packed")
    chosen = settings(steps, batch, micro_batch_sequences=batch, packing=packing)
    return ours(tokens, chosen) if side.startswith("ours") else peer(tokens, chosen)


def peer(tokens: Path, chosen: TrainSettings) -> Run:
    """Train with TRL, which renders, masks and packs the conversations itself."""
    import datasets
    import trl

    tokenizer = load_tokenizer(local_model(BASE))
    tokenizer.chat_template = marked(template_of_folder(local_model(BASE)).text)
    learned: list[int] = []

    class Trainer(trl.SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            learned.append(int((inputs["labels"][:, 1:] != IGNORED).sum()))
            return super().compute_loss(model, inputs, *more, **named)

    model, optimizers = model_and_optimizers(chosen)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            folder, max_steps=chosen.max_steps, use_cpu=True, bf16=False, max_length=LENGTH,
            packing=chosen.packing, assistant_only_loss=True, gradient_checkpointing=False,
            per_device_train_batch_size=chosen.batch_sequences, max_grad_norm=chosen.clip_norm,
            save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
            seed=chosen.seed,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, processing_class=tokenizer, callbacks=[watch],
            train_dataset=datasets.Dataset.from_list(in_order(tokens, chosen)),
            optimizers=optimizers,
        )  # fmt: skip
        trainer.train()
    peak = memory_bytes(torch.device("cpu"))
    counts = np.cumsum(learned).tolist()
    return {"seconds": watch.seconds, "losses": watch.losses, "tokens": counts, "bytes": peak}


def in_order(tokens: Path, chosen: TrainSettings) -> list[dict[str, Any]]:
    """The conversations that our side trains on, in its order."""
    split = PackedSplit(tokens, "train", LENGTH, chosen.seed, packing=chosen.packing)
    rows = split.batch(0, 0, chosen.max_steps * chosen.batch_sequences)
    reader = TokenReader(tokens, "train")
    index_of = {
        tuple(reader.document(n)[: int(reader.learned(n)[-1, 1]) - 1].tolist()): n
        for n in range(len(reader.lengths()))
    }
    found = []
    for ids, positions, targets in zip(rows.inputs, rows.positions, rows.targets, strict=True):
        last = int((targets != IGNORED).nonzero().max()) + 1
        starts = [*(positions[:last] == 0).nonzero().flatten().tolist(), last]
        for begin, end in itertools.pairwise(starts):
            found.append(index_of[tuple(ids[begin:end].tolist())])
    chats = conversations()[2:]
    return [{"messages": chats[index]} for index in found]


def speed(run: Run) -> float:
    """Learned tokens per second, without the first step."""
    return float((run["tokens"][-1] - run["tokens"][0]) / (run["seconds"][-1] - run["seconds"][0]))


def compare(runs: dict[str, list[Run]], batch: int) -> list[Measure]:
    """Speed and memory packed; learned tokens and losses unpacked."""
    what = named(batch)
    middle = {name: median(map(speed, kept)) for name, kept in runs.items()}
    peak = {name: median(run["bytes"] for run in kept) / 2**20 for name, kept in runs.items()}
    mine, theirs = runs["ours unpacked"][-1], runs["TRL unpacked"][-1]
    pairs = list(zip(mine["losses"], theirs["losses"], strict=True))
    apart = max(abs(one / other - 1) for one, other in pairs)
    learned = abs(mine["tokens"][-1] - theirs["tokens"][-1])
    packed = runs["ours packed"][-1]["tokens"][-1], runs["TRL packed"][-1]["tokens"][-1]
    return [
        Measure(
            f"{what}, packed: speed", "learned tokens/s", middle["ours packed"],
            middle["TRL packed"], PEER, goal=1.3, better="higher",
            note=f"{packed[0]} and {packed[1]} learned tokens",
        ),
        Measure(
            f"{what}, packed: peak memory", "MiB", peak["ours packed"], peak["TRL packed"], PEER,
            goal=0.85,
        ),
        Measure(
            f"{what}, unpacked: speed", "learned tokens/s", middle["ours unpacked"],
            middle["TRL unpacked"], PEER, better="higher",
        ),
        Measure(
            f"{what}, unpacked: difference in learned tokens", "tokens", learned, goal=0,
            note=f"{mine['tokens'][-1]} and {theirs['tokens'][-1]}",
        ),
        Measure(f"{what}, unpacked: largest difference of losses", "share", apart, goal=1e-3),
    ]  # fmt: skip
