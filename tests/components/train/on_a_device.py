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


def shown(values: Any) -> str:
    """The figures, rounded to the digits that the order of sums does not change."""
    return re.sub(r"\d+\.\d+(e[-+]\d+)?", lambda match: f"{float(match[0]):.2g}", repr(values))


def test_evaluation_gives_the_same_figures_as_on_the_cpu(tiny_model: Path) -> None:
    texts = ["The tower of Paris is tall, and so is the next.", "Another text, not so long."]
    figures = []
    for device in (second_device.load(), torch.device("cpu")):
        model, tokenizer = load_model(tiny_model).to(device), load_tokenizer(tiny_model)
        scores = score(model, tokenizer, texts, first_token=None, window=16, stride=8, bar=NoBar())
        probes = answer(model, tokenizer, [Probe(prompt="the tower of", target=" Paris")])
        completions = complete(model, tokenizer, ["the tower of"], 5, twice=True)
        figures.append((scores, probes, completions))
    for there, here in zip(*figures, strict=True):
        assert shown(there) == shown(here)
