"""Which weights a run keeps: those of its best validation, and early stopping."""

import dataclasses
import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.models.language_model import load_model
from nudge.components.train.checkpoints.checkpoint_store import CheckpointStore
from nudge.components.train.checkpoints.training_state import TrainingState
from nudge.components.train.data import PackedSplit
from nudge.components.train.loop import validation_loss
from nudge.components.train.models.network import Network
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import lines, outputs, weights

Small = Callable[..., TrainSettings]


def selected_on(folder: Path) -> list[int]:
    facts = json.loads((folder / "model" / "nudge.json").read_text())
    return list(facts["selected_on"])


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Validation losses by step, for the test to fill in; each replaces the loss of its step."""
    losses: dict[int, float] = {}
    validated: Any = TrainingState.validated
    monkeypatch.setattr(
        TrainingState, "validated", lambda self, loss: validated(self, losses.get(self.step, loss))
    )
    return losses


def training_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model" / "nudge.json").read_text())["training"])


def weights_of(folder: Path) -> int:
    return int(training_of(folder)["weights_of_step"])


def test_the_best_weights_are_kept_and_training_ends_early(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    values = {"learning_rate": 0.05, "validation_every": 1, "early_stopping": 3, "max_steps": 60}
    results = train(small(**values), tokens=tokens, **outputs(tmp_path / "a"))
    losses = lines(tmp_path / "a", "validation_loss")
    best = min(losses[1:])
    assert losses.index(best) + 3 == results["steps"] < 60
    split = PackedSplit(tokens, "validation", 16, seed=1)
    settings = small(**values)
    kept = Network(load_model(tmp_path / "a" / "model"), settings)
    assert validation_loss(kept, split, settings) == pytest.approx(best, rel=1e-6)
    assert selected_on(tmp_path / "a") == split.documents_of(settings.validation_sequences) != []


def test_selected_on_lists_documents_only_if_there_was_a_choice(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    for name, values, chosen in (
        ("last", {"validation_every": 4}, False),
        ("once", {"validation_every": 50, "keep": "best"}, False),  # only at the end
        ("best", {"validation_every": 4, "keep": "best", "validation_sequences": 1}, True),
    ):
        train(small(**values), tokens=tokens, **outputs(tmp_path / name))
        assert bool(selected_on(tmp_path / name)) is chosen
    one_row = PackedSplit(tokens, "validation", 16, seed=1).documents_of(1)
    assert selected_on(tmp_path / "best") == one_row
    assert 0 < len(one_row) < 6


def test_a_validation_whose_checkpoint_failed_is_not_the_best(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    validations: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The disk is full during the checkpoint of step 4, so step 2 is the best with a checkpoint."""
    publish = CheckpointStore.publish

    def full(self: CheckpointStore, name: str, *args: Any) -> None:
        if name.endswith("4"):
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(self, name, *args)

    monkeypatch.setattr(CheckpointStore, "publish", full)
    validations |= {2: 2.0, 4: 1.0, 6: 3.0, 8: 4.0, 10: 5.0, 12: 6.0}
    values = {"validation_every": 2, "checkpoints": str(tmp_path / "checkpoints")}
    settings = small(**values, keep="best")
    train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert "step-000000004 failed: no space is left there" in capfd.readouterr().err
    assert weights_of(tmp_path / "a") == 2
    assert training_of(tmp_path / "a")["best_validation_loss"] == 2.0
    monkeypatch.setattr(CheckpointStore, "publish", publish)
    train(settings, tokens=tokens, **outputs(tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(tmp_path / "a")


def test_a_failed_last_checkpoint_does_not_cost_the_model(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = CheckpointStore.publish

    def full(self: CheckpointStore, name: str, *args: Any) -> None:
        if name.endswith("9"):
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(self, name, *args)

    monkeypatch.setattr(CheckpointStore, "publish", full)
    settings = small(checkpoints=str(tmp_path / "checkpoints"))
    train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert weights_of(tmp_path / "a") == 12


def test_the_search_restarts_if_the_best_has_no_checkpoint(
    half: tuple[TrainSettings, Path],
    tokens: Path,
    tmp_path: Path,
    validations: dict[int, float],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The interrupted run kept only its last checkpoints; its best validation was at step 8."""
    settings = dataclasses.replace(half[0], keep="best", validation_every=1)
    validations |= {10: 8.0, 11: 7.0, 12: 9.0}
    train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert "of step 8, has no checkpoint: the search restarts" in capfd.readouterr().err
    assert weights_of(tmp_path / "a") == 11


def test_a_nan_validation_loss_is_never_the_best(
    small: Small, tokens: Path, tmp_path: Path, validations: dict[int, float]
) -> None:
    validations |= {4: 2.0, 8: 3.0, 12: math.nan}
    train(small(keep="best"), tokens=tokens, **outputs(tmp_path / "a"))
    assert weights_of(tmp_path / "a") == 4
    state = TrainingState()
    assert not state.validated(math.nan)
    assert state.validated(3.0)
