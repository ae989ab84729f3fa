"""Conversations in training: complete, apart from each other, and one loss whatever the packing."""

import copy
import dataclasses
import itertools
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
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nudge.components.common.artifacts.tokens import TokenReader, token_dtype
from nudge.components.common.core.errors import UserError
from nudge.components.train.data import IGNORED, PackedSplit, Rows, tokens_in
from nudge.components.train.loop import accumulate
from nudge.components.train.models.network import Network
from nudge.components.train.packing import pack
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import lines, outputs, weights, write_tokens
from tests.token_shards import write_shard

LENGTH = 24


def draw(count: int, seed: int = 4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Conversations of up to three turns with learned answers, and now and then a text."""
    random = np.random.default_rng(seed)
    documents, learned = [], []
    for number in range(count):
        if number % 7 == 3:
            documents.append(np.append(random.integers(1, 250, random.integers(2, 60)), 0))
            learned.append(np.empty((0, 2), np.int64))
            continue
        spans, at = [], 0
        for _ in range(random.integers(1, 4)):
            begin = at + int(random.integers(1, 4))
            at = begin + int(random.integers(1, 4))
            spans.append((begin, at))
        tail = random.integers(0, 3)  # nothing learns from what follows the last answer
        documents.append(random.integers(1, 250, at + tail))
        learned.append(np.array(spans))
    return documents, learned


def write_chats(folder: Path, tiny_model: Path, count: int = 40) -> Path:
    """A tokens artifact of which most documents are conversations."""
    write_tokens(folder, tiny_model)
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, documents in (("train", count), ("validation", 8)):
        path = folder / f"{split}.bin"
        ids, spans = draw(documents, seed=documents)
        write_shard(path, ids, token_dtype(300), spans)
        digest = sha256(path.read_bytes()).hexdigest()
        manifest["splits"][split] = {"shards": [{"file": path.name, "sha256": digest}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats"), tiny_model)


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=300, num_attention_heads=4, **sizes)  # type: ignore[arg-type]
    return LlamaForCausalLM(config).to(dtype)


def chat_only(folder: Path, tiny_model: Path) -> Path:
    """Only conversations: texts continue across rows, so that their context depends on the rows."""
    write_tokens(folder, tiny_model)
    manifest = json.loads((folder / "manifest.json").read_text())
    chosen = [pair for pair in zip(*draw(40), strict=True) if len(pair[1])]
    write_shard(
        folder / "train.bin", [d for d, _ in chosen], token_dtype(300), [s for _, s in chosen]
    )
    digest = sha256((folder / "train.bin").read_bytes()).hexdigest()
    manifest["splits"]["train"] = {"shards": [{"file": "train.bin", "sha256": digest}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("packing", [True, False])
def test_every_conversation_is_complete_in_one_row_per_epoch(chats: Path, packing: bool) -> None:
    reader = TokenReader(chats, "train")
    wanted = []
    for index in np.flatnonzero(reader.span_counts()).tolist():
        ids, spans = reader.document(index).tolist(), reader.learned(index).tolist()
        targets = [IGNORED] * (spans[-1][1] - 1)
        for begin, end in spans:
            targets[begin - 1 : end - 1] = ids[begin:end]
        wanted.append((ids[: len(targets)], targets))
    split = PackedSplit(chats, "train", LENGTH, seed=1, packing=packing)
    for epoch in (0, 1):
        rows = split.batch(epoch, 0, split.rows)
        found = []
        for inputs, targets, positions in zip(
            rows.inputs.tolist(), rows.targets.tolist(), rows.positions.tolist(), strict=True
        ):
            starts = [n for n in range(LENGTH) if positions[n] == 0]
            for begin, end in zip(starts, [*starts[1:], LENGTH], strict=True):
                assert positions[begin:end] == list(range(end - begin))
                found.append((inputs[begin:end], targets[begin:end]))
        for conversation in wanted:
            assert found.count(conversation) == wanted.count(conversation)
    texts = reader.lengths()[reader.span_counts() == 0].sum()
    learned = sum(sum(t != IGNORED for t in targets) for _, targets in wanted)
    assert int((rows.targets != IGNORED).sum()) == texts + learned
    assert tokens_in(rows) == texts + sum(len(inputs) for inputs, _ in wanted)


def test_packing_needs_few_rows_and_depends_only_on_its_arguments() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 200, 3000)
    rows = pack(lengths, 256, seed=3)
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    assert max(int(lengths[row].sum()) for row in rows) <= 256
    assert len(rows) <= 1.03 * lengths.sum() / 256
    assert all(np.array_equal(a, b) for a, b in zip(rows, pack(lengths, 256, 3), strict=True))
    assert pack(np.empty(0, np.int64), 256, 3) == []
    pairs = np.array([100, 156] * 500)  # two of 100 tokens in a row would waste 56
    assert [len(row) for row in pack(pairs, 256, seed=3)] == [2] * 500


def test_a_conversation_longer_than_a_row_is_refused(chats: Path) -> None:
    with pytest.raises(UserError, match=r"conversations are longer than train.sequence_length = 9"):
        PackedSplit(chats, "train", 9, seed=1)


def test_ranks_divide_the_batch_and_a_cursor_knows_the_packing(chats: Path) -> None:
    alone = PackedSplit(chats, "train", LENGTH, seed=1)
    for step in (0, 3, 9):
        whole = alone.step_batch(step, 5)
        parts = [alone.step_batch(step, 5, rank, 3) for rank in range(3)]
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    cursor = alone.cursor(7)
    assert PackedSplit(chats, "train", LENGTH, seed=1).resume(cursor) == 7
    with pytest.raises(UserError, match="packing True, now False"):
        PackedSplit(chats, "train", LENGTH, seed=1, packing=False).resume(cursor)


def test_documents_of_names_those_with_targets_in_the_first_rows(chats: Path) -> None:
    split = PackedSplit(chats, "train", LENGTH, seed=1)
    reader = TokenReader(chats, "train")
    assert split.documents_of(split.rows) == list(range(reader.documents))
    seen = [set(split.documents_of(rows)) for rows in range(1, split.rows + 1)]
    assert all(one <= other for one, other in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=str
)
def test_packed_unpacked_and_accumulated_losses_agree(
    tmp_path: Path, tiny_model: Path, dtype: torch.dtype, tolerance: float
) -> None:
    tokens = chat_only(tmp_path, tiny_model)
    start, found = model(dtype), {}
    for packing, length, sizes in ((True, 24, (99, 3, 1)), (True, 64, (99, 2)), (False, 24, (9,))):
        split = PackedSplit(tokens, "train", length, seed=1, packing=packing)
        rows = split.batch(0, 0, split.rows)
        for size in sizes:
            settings = TrainSettings(base_model="x", micro_batch_sequences=size, packing=packing)
            network = Network(copy.deepcopy(start), settings)
            loss = accumulate(network, rows, settings)
            assert loss is not None
            gradient = torch.cat([p.grad.flatten() for p in network.model.parameters()])
            found[packing, length, size] = loss.value, loss.tokens, gradient
    (value, count, gradient), *others = found.values()
    for other, tokens_there, its_gradient in others:
        assert tokens_there == count
        assert other == pytest.approx(value, rel=tolerance)
        torch.testing.assert_close(its_gradient, gradient, rtol=10 * tolerance, atol=tolerance)


def test_conversations_in_a_row_do_not_see_each_other(tmp_path: Path, tiny_model: Path) -> None:
    split = PackedSplit(chat_only(tmp_path, tiny_model), "train", LENGTH, seed=1)
    rows = split.batch(0, 0, split.rows)
    shared = next(n for n in range(split.rows) if (rows.positions[n, 1:] == 1).sum() > 1)
    inputs, targets, positions = (part[shared : shared + 1] for part in (
        rows.inputs, rows.targets, rows.positions,
    ))  # fmt: skip
    second = int((positions[0] == 0).nonzero()[1])
    settings = TrainSettings(base_model="x")
    network = Network(model(torch.float64), settings)
    masked = targets.clone()
    masked[:, :second] = IGNORED
    changed = inputs.clone()
    changed[:, :second] = (changed[:, :second] + 5) % 300
    one, two = (network.summed_loss(Rows(each, masked, positions)) for each in (inputs, changed))
    assert one.item() == two.item()


TWO_RANKS = """
import dataclasses, json, sys
import torch
from pathlib import Path
from nudge.components.train.data import PackedSplit
from nudge.components.train.loop import accumulate, rank_rows
from nudge.components.train.models.network import Network
from nudge.components.train.ranks import joined_ranks
from nudge.components.train.settings import TrainSettings
from tests.components.train.test_conversations import LENGTH, model

torch.set_num_threads(1)
found = []
with joined_ranks() as ranks:
    for dtype in (torch.float64, torch.float32):
        for parallelism in ("ddp", "fsdp"):
            settings = TrainSettings(base_model="x", parallelism=parallelism)
            network = Network(model(dtype), settings, ranks)
            split = PackedSplit(Path(sys.argv[1]), "train", LENGTH, seed=1)
            for step in (0, 3):  # five rows for two ranks: one of them has padding
                loss = accumulate(network, rank_rows(split, step, 5, ranks), settings)
                parameters = list(network.model.parameters())
                total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
                norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
                network.model.zero_grad()
                found.append([loss.value, loss.tokens, loss.read, norm])
    if ranks.main:
        Path(sys.argv[2]).write_text(json.dumps(found))
"""


def test_two_ranks_have_the_loss_and_the_gradient_of_one(chats: Path, tmp_path: Path) -> None:
    script, results = tmp_path / "ranks.py", tmp_path / "found.json"
    script.write_text(TWO_RANKS)
    line = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run(
        [sys.executable, "-m", *map(str, (*line, chats, results))], check=True, env=environment
    )
    found = iter(json.loads(results.read_text()))
    split = PackedSplit(chats, "train", LENGTH, seed=1)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        settings = TrainSettings(base_model="x")
        alone = Network(model(dtype), settings)
        for _, step in itertools.product(("ddp", "fsdp"), (0, 3)):
            loss = accumulate(alone, split.step_batch(step, 5), settings)
            assert loss is not None
            norm = torch.nn.utils.get_total_norm([p.grad for p in alone.model.parameters()])
            alone.model.zero_grad()
            value, tokens, read, its_norm = next(found)
            assert (tokens, read) == (loss.tokens, loss.read)
            assert value == pytest.approx(loss.value, rel=tolerance, abs=0)
            assert its_norm == pytest.approx(norm.item(), rel=10 * tolerance, abs=0)


def test_a_run_on_conversations_resumes_exactly(
    small: Callable[..., TrainSettings], chats: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from nudge.components.train.record import TrainingLog

    values: dict[str, Any] = {"sequence_length": LENGTH, "max_steps": 8, "checkpoint_every": 3}
    train(small(**values), tokens=chats, **outputs(tmp_path / "whole"))
    original = TrainingLog.metric

    def metric(self: TrainingLog, figures: dict[str, float]) -> None:
        if figures["step"] == 5 and "loss" in figures:
            raise KeyboardInterrupt
        original(self, figures)

    settings = small(**values, checkpoints=str(tmp_path / "checkpoints"))
    monkeypatch.setattr(TrainingLog, "metric", metric)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tokens=chats, **outputs(tmp_path / "cut"))
    monkeypatch.setattr(TrainingLog, "metric", original)
    train(settings, tokens=chats, **outputs(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    unpacked = dataclasses.replace(settings, packing=False, checkpoints="")
    train(unpacked, tokens=chats, **outputs(tmp_path / "unpacked"))
