"""Train, evaluate and export on a device type other than the CPU (`tests.second_device`): a tensor
on the wrong device fails here, as it would on a GPU."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.evaluate.completions import complete
from nudge.components.evaluate.perplexity import score
from nudge.components.evaluate.probes import answer
from nudge.components.evaluate.settings import Probe
from nudge.components.train import ranks
from nudge.components.train.ranks import Ranks
from nudge.components.train.record import NoBar, TrainingLog
from nudge.components.train.settings import TrainSettings, WatchedPrompt
from nudge.components.train.train import train
from nudge.kernels import fused_linear_cross_entropy
from nudge.kernels.arguments import Inputs, Options, Wanted
from nudge.kernels.chunked import chunked
from tests import second_device
from tests.components.train.conftest import lines, outputs, weights

pytestmark = pytest.mark.skipif(bool(second_device.why_not()), reason=second_device.why_not())
Small = Callable[..., TrainSettings]
SHAPE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "best-recomputed": {"keep": "best", "activation_checkpointing": True},
    "lora": {"mode": "lora", "lora_rank": 4, "learning_rate": 1e-2},
    "scratch": {"mode": "scratch", "base_model": "", "model_config": SHAPE},
}


@contextlib.contextmanager
def on_the_device() -> Iterator[None]:
    """Train on the second device, as one rank."""

    @contextlib.contextmanager
    def joined() -> Iterator[Ranks]:
        yield Ranks(device=second_device.load())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranks, "joined_ranks", joined)
        yield


def close(one: Path, other: Path) -> None:
    """Assert equal weights, except for the order of sums."""
    there, here = load_file(one), load_file(other)
    assert there.keys() == here.keys()
    for key, tensor in there.items():
        torch.testing.assert_close(tensor, here[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_the_same_model_as_on_the_cpu(
    mode: str, small: Small, tokens: Path, tmp_path: Path
) -> None:
    settings = small(
        **MODES[mode],
        watch=WatchedPrompt(prompt="a b", target=" c"),
        max_steps=4,
        validation_every=2,
    )
    with on_the_device():
        train(settings, tokens=tokens, **outputs(tmp_path / "there"))
    train(settings, tokens=tokens, **outputs(tmp_path / "here"))
    assert lines(tmp_path / "there") == pytest.approx(lines(tmp_path / "here"), rel=1e-4)
    for name in ("model.safetensors", *(["adapter/adapter_model.safetensors"] * (mode == "lora"))):
        close(tmp_path / "there" / "model" / name, tmp_path / "here" / "model" / name)
    probes = [
        [json.loads(line)["p"] for line in (side / "probes.jsonl").read_text().splitlines()]
        for side in (tmp_path / "there" / "history", tmp_path / "here" / "history")
    ]
    assert probes[0] == pytest.approx(probes[1], rel=1e-2)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_an_interrupted_run_resumes_from_its_checkpoint(
    mode: str, small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingLog.metric

    def metric(self: TrainingLog, values: dict[str, float]) -> None:
        if values["step"] == 5 and "loss" in values:
            raise KeyboardInterrupt
        original(self, values)

    given = {**MODES[mode], "max_steps": 6}
    settings = small(**given, checkpoints=str(tmp_path / "checkpoints"))
    with on_the_device():
        train(small(**given), tokens=tokens, **outputs(tmp_path / "whole"))
        monkeypatch.setattr(TrainingLog, "metric", metric)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
        monkeypatch.setattr(TrainingLog, "metric", original)
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


class _Watched(TorchDispatchMode):
    """Records the rows of every matrix product, and refuses whatever makes a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero"), name
        if name == "aten::mm.out":
            self.rows.append(len(args[0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [0, 50, 70, 90, 100])
def test_masked_rows_skip_the_head_with_the_same_gradients(masked: int) -> None:
    made = torch.Generator().manual_seed(masked)
    hidden, weight = (torch.randn(n, 16, generator=made) for n in (200, 64))
    targets = torch.randint(0, 64, (200,), generator=made)
    targets[torch.randperm(200, generator=made)[: 2 * masked]] = -100
    valid = 200 - 2 * masked
    device, results = second_device.load(), []
    for count in (None, valid):
        inputs = Inputs(hidden.to(device), weight.to(device), None, targets.to(device), None)
        options = Options(valid_rows=count, chunk_rows=64)
        with _Watched() as seen:
            made_there = chunked(inputs, None, options, Wanted(True, True, False))
        assert sum(seen.rows) >= (200 if count is None else valid)
        if count is not None:
            assert max(seen.rows, default=0) <= max(valid, 1) or valid > 64
            assert sum(seen.rows) < 200 + 200 * (valid == 200)
        results.append(
            [
                part.cpu()
                for part in (made_there.losses, made_there.hidden, made_there.weight)
                if part is not None
            ]
        )
    here = chunked(
        Inputs(hidden, weight, None, targets, None), None, Options(), Wanted(True, True, False)
    )
    for all_rows, fewer, cpu in zip(*results, (here.losses, here.hidden, here.weight), strict=True):
        torch.testing.assert_close(fewer, all_rows)
        torch.testing.assert_close(fewer, cpu)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_loss_says_if_the_number_of_valid_rows_is_wrong(reduction: str) -> None:
    device = second_device.load()
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    targets = torch.tensor([1, -100, 2, -100, 8, -100])
    loss: Any = fused_linear_cross_entropy
    expected = loss(hidden, weight, targets, reduction=reduction)
    moved = [value.to(device) for value in (hidden, weight, targets)]
    right = loss(*moved, reduction=reduction, valid_rows=3).cpu()
    torch.testing.assert_close(right, expected)
    assert loss(*moved, reduction=reduction, valid_rows=2).cpu().isnan().all()
    with pytest.raises(ValueError, match="valid_rows 2: expected 3"):
        loss(hidden, weight, targets, reduction=reduction, valid_rows=2)


def shown(values: Any) -> str:
    """The figures, rounded to the digits that the order of sums does not change."""
    return re.sub(r"\d+\.\d+(e[-+]\d+)?", lambda match: f"{float(match[0]):.2g}", repr(values))


def test_evaluation_gives_the_same_figures_as_on_the_cpu(tiny_model: Path) -> None:
    texts = ["The tower of Paris is tall, and so is the next.", "Another text, not so long."]
    figures = []
    bar: Any = NoBar()
    for device in (second_device.load(), torch.device("cpu")):
        model, tokenizer = load_model(tiny_model).to(device), load_tokenizer(tiny_model)
        scores = score(model, tokenizer, texts, first_token=None, window=16, stride=8, bar=bar)
        probes = answer(model, tokenizer, [Probe(prompt="the tower of", target=" Paris")])
        completions = complete(model, tokenizer, ["the tower of"], 5, twice=True)
        figures.append((scores, probes, completions))
    for there, here in zip(*figures, strict=True):
        assert shown(there) == shown(here)
