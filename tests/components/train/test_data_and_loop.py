"""Each token is used once per epoch; packing and micro-batches do not change loss or gradients."""

import contextlib
import copy
import itertools
import json
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nudge.components.common.artifacts.tokens import TokenReader, token_dtype
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import load_tokenizer
from nudge.components.train.data import IGNORED, PackedSplit, Rows
from nudge.components.train.loop import Loss, _watch, accumulate, learning_rate
from nudge.components.train.models.adapt import adapt
from nudge.components.train.models.model import check_length
from nudge.components.train.models.network import Network
from nudge.components.train.record import NoTrainingLog
from nudge.components.train.settings import TrainSettings, WatchedPrompt
from tests.token_shards import write_shard

END = 0
LENGTHS = [5, 1, 17, 40, 3, 9, 26]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    random = np.random.default_rng(3)
    documents = [np.append(random.integers(1, 300, n - 1), END) for n in LENGTHS]
    write_shard(tmp_path / "a.bin", documents, token_dtype(300))
    digest = sha256((tmp_path / "a.bin").read_bytes()).hexdigest()
    shards = {"shards": [{"file": "a.bin", "sha256": digest}]}
    manifest = {"format": "nudge.tokens", "version": 1, "end_of_document_id": END}
    text = json.dumps({**manifest, "splits": {"train": shards}})
    (tmp_path / "manifest.json").write_text(text)
    return tmp_path


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, num_attention_heads=4, **sizes))


def settings(**values: object) -> TrainSettings:
    return TrainSettings(base_model="x", **values)  # type: ignore[arg-type]


def batch_loss(model: LlamaForCausalLM, rows: Rows, **values: object) -> Loss:
    chosen = settings(**values)
    loss = accumulate(Network(model, chosen), rows, chosen)
    assert loss is not None
    return loss


def test_a_row_has_each_full_document_with_its_own_positions(tokens: Path) -> None:
    row = PackedSplit(tokens, "train", sum(LENGTHS), seed=1).batch(0, 0, 1)
    inputs, targets, positions = row.inputs[0], row.targets[0], row.positions[0]
    starts = [*torch.nonzero(positions == 0).flatten().tolist(), sum(LENGTHS)]
    found = []
    for start, stop in itertools.pairwise(starts):
        assert positions[start:stop].tolist() == list(range(stop - start))
        assert inputs[start] == END
        assert torch.equal(inputs[start + 1 : stop], targets[start : stop - 1])
        found.append(targets[start:stop].tolist())
    reader = TokenReader(tokens, "train")
    assert sorted(found) == sorted(reader.document(i).tolist() for i in range(len(LENGTHS)))


def test_each_target_appears_once_per_epoch(tokens: Path) -> None:
    whole = PackedSplit(tokens, "train", sum(LENGTHS), seed=1).batch(0, 0, 1).targets[0]
    split = PackedSplit(tokens, "train", 16, seed=1)
    cut = split.batch(0, 0, split.rows).targets.flatten()
    assert cut[cut != IGNORED].tolist() == whole.tolist()


def test_documents_of_gives_the_indices_of_the_first_rows_documents(tokens: Path) -> None:
    reader = TokenReader(tokens, "train")
    texts = [reader.document(index).tolist() for index in range(len(LENGTHS))]
    targets = PackedSplit(tokens, "train", sum(LENGTHS), seed=1).batch(0, 0, 1).targets[0].tolist()
    owners: list[int] = []  # the document of each target; a document ends at END
    while len(owners) < len(targets):
        stop = targets.index(END, len(owners)) + 1
        owners += [texts.index(targets[len(owners) : stop])] * (stop - len(owners))
    split = PackedSplit(tokens, "train", 16, seed=1)
    for rows in range(1, split.rows + 2):
        assert split.documents_of(rows) == sorted(set(owners[: 16 * rows]))
    assert split.documents_of(split.rows) == list(range(len(LENGTHS)))


def test_a_row_depends_only_on_its_index(tokens: Path) -> None:
    straight = PackedSplit(tokens, "train", 16, seed=1).batch(0, 0, 20)
    jumping = PackedSplit(tokens, "train", 16, seed=1)
    for index in [19, 0, 7, 6, 13]:
        one = jumping.batch(0, index, 1)
        assert torch.equal(one.inputs[0], straight.inputs[index])
        assert torch.equal(one.targets[0], straight.targets[index])
        assert torch.equal(one.positions[0], straight.positions[index])
    other = PackedSplit(tokens, "train", 16, seed=2).batch(0, 0, 20)
    assert not torch.equal(other.targets, straight.targets)
    assert not torch.equal(straight.targets[: jumping.rows], jumping.batch(1, 0, 7).targets)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_order_is_the_same_on_any_number_of_ranks(tokens: Path, ranks: int) -> None:
    alone = PackedSplit(tokens, "train", 16, seed=1)
    for step in (0, 1, 5):  # step 5 is in the second epoch
        whole = alone.batch(0, step * 5, 5)
        splits = [PackedSplit(tokens, "train", 16, seed=1) for _ in range(ranks)]
        parts = [split.step_batch(step, 5, rank, ranks) for rank, split in enumerate(splits)]
        for name in ("inputs", "targets", "positions"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))


def test_a_cursor_resumes_twice_and_with_another_batch_size(tokens: Path) -> None:
    straight = PackedSplit(tokens, "train", 16, seed=1).batch(0, 0, 18).targets
    read, parts = 0, []
    for batch, steps in ((4, 2), (3, 2), (2, 2)):
        split = PackedSplit(tokens, "train", 16, seed=1)
        read = split.resume(json.loads(json.dumps(split.cursor(read))))
        for _ in range(steps):
            parts.append(split.batch(0, read, batch).targets)
            read += batch
    assert torch.equal(torch.cat(parts), straight)


def test_a_cursor_of_other_data_or_order_is_rejected(tokens: Path) -> None:
    cursor = PackedSplit(tokens, "train", 16, seed=1).cursor(5)
    with pytest.raises(UserError, match="seed 1, now 2"):
        PackedSplit(tokens, "train", 16, seed=2).resume(cursor)
    with pytest.raises(UserError, match="length 16, now 8"):
        PackedSplit(tokens, "train", 8, seed=1).resume(cursor)


def test_micro_batches_give_the_gradient_of_the_large_batch(
    tokens: Path, model: LlamaForCausalLM
) -> None:
    split = PackedSplit(tokens, "train", 16, seed=1)
    rows = split.batch(0, 0, split.rows)
    results = []
    for size in (split.rows, 2):
        model.zero_grad()
        loss = batch_loss(model, rows, micro_batch_sequences=size)
        assert loss.tokens == sum(LENGTHS)
        results.append((loss.value, [p.grad.clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for whole, parts in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_packed_document_does_not_attend_to_the_one_before(model: LlamaForCausalLM) -> None:
    ids = torch.from_numpy(np.random.default_rng(1).integers(1, 300, (1, 24)))
    targets = torch.cat((torch.full((1, 10), IGNORED), ids[:, 11:], ids[:, :1]), 1)
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    packed = batch_loss(model, Rows(ids, targets, positions))
    alone = Rows(ids[:, 10:], targets[:, 10:], torch.arange(14)[None])
    assert packed.value == pytest.approx(batch_loss(model, alone).value, rel=1e-6)


def test_initial_adapters_do_not_depend_on_earlier_random_numbers(model: LlamaForCausalLM) -> None:
    """Converting a base model draws numbers; loading it from the cache does not."""
    other = copy.deepcopy(model)
    one = adapt(model, settings(mode="lora", seed=3)).state_dict()
    torch.rand(10)
    two = adapt(other, settings(mode="lora", seed=3)).state_dict()
    assert any("lora_A" in name for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_schedules_at_known_steps() -> None:
    common = {"learning_rate": 1.0, "warmup_share": 0.1, "final_learning_rate_share": 0.0}
    cosine = [learning_rate(settings(**common), step, 20) for step in (0, 1, 2, 11)]
    assert cosine == pytest.approx([0.5, 1.0, 1.0, 0.5])
    wsd = settings(**common, schedule="wsd", decay_share=0.2)
    stable = [learning_rate(wsd, step, 20) for step in (0, 1, 2, 16, 17, 18, 19)]
    assert stable == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_a_watched_target_with_probability_zero_does_not_end_training(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens in a run that diverges, which its loss should end, with advice."""
    tokenizer, record = load_tokenizer(tiny_model), NoTrainingLog()
    only_first = torch.zeros(len(tokenizer)).index_fill(0, torch.tensor([0]), 1.0)
    network: Any = SimpleNamespace(model=nn.Module(), probabilities=lambda *_: only_first[None])
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(record, "probe", seen.append)
    _watch(network, tokenizer, settings(watch=WatchedPrompt(prompt="a", target="b")), 3, record)
    assert seen[0]["p"] == 0.0
    assert seen[0]["loss"] is None


@pytest.mark.parametrize(("kind", "fits"), [("gpt2", False), ("opt", False), ("llama", True)])
def test_rows_longer_than_learned_positions_are_rejected(kind: str, fits: bool) -> None:
    shape = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **shape)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    check_length(made, settings(sequence_length=64))
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(
            UserError,
            match=f"sequence_length = 65: {type(made).__name__} has 64 positions; lower it to 64",
        )
    ):
        check_length(made, settings(sequence_length=65))
