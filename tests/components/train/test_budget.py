"""A training that its budget stops ends with a checkpoint, and a larger budget resumes from it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.core.errors import UserError
from nudge.components.common.spending.budget import OverBudget
from nudge.components.common.spending.prices import Budget, Prices
from nudge.components.common.spending.usage import Meter, Usage
from nudge.components.train import spending
from nudge.components.train.limits import Limits
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import command, lines, outputs, weights, write_recipe

Small = Callable[..., TrainSettings]


@pytest.fixture
def hour_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reading of the meter is one more core hour; steps do the readings."""
    readings = iter(range(1, 1000))

    def read(_: Meter) -> Usage:
        return Usage(seconds=1.0, core_seconds=3600.0 * next(readings))

    monkeypatch.setattr(Meter, "read", read)


def test_a_projection_after_the_first_steps_stops_what_would_not_suffice(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    paths = outputs(tmp_path / "a")
    with pytest.raises(OverBudget, match=r"^over budget: the run needs about") as caught:
        train(small(), Limits(Budget(core_hours=1e-6), Prices()), tokens=tokens, **paths)
    assert "Training stopped after step 2 of 12" in str(caught.value)
    assert "budget.core_hours is 1e-06" in str(caught.value)
    assert not paths["model"].exists()
    train(small(), Limits(Budget(core_hours=100.0), Prices()), tokens=tokens, **paths)
    assert len(lines(tmp_path / "a")) == 12  # it went on from step 2
    train(small(checkpoints=str(tmp_path / "other")), tokens=tokens, **outputs(tmp_path / "b"))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_what_is_spent_ends_the_training_at_a_checkpoint(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    hour_per_step: None,
) -> None:  # fmt: skip
    monkeypatch.setenv("NUDGE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setattr(spending.Spending, "after_step", lambda *_: "")  # only the checkpoints
    prices = Prices(core_hour=2.0)
    with pytest.raises(OverBudget, match="has used USD 4") as caught:
        train(small(), Limits(Budget(cost=3.0), prices), tokens=tokens, **outputs(tmp_path))
    assert "stopped after step 6 of 12; the checkpoint is " in str(caught.value)


def test_interrupted_attempts_count_and_the_facts_have_the_sum(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt takes one core hour, as far as the meter says."""
    hour = Usage(seconds=1.0, core_seconds=3600.0)
    monkeypatch.setattr(Meter, "read", lambda _: hour)
    monkeypatch.setenv("NUDGE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    limits = Limits(Budget(core_hours=0.5), Prices())
    with pytest.raises(UserError, match="over budget"):
        train(small(), limits, tokens=tokens, **outputs(tmp_path))
    result = train(small(), tokens=tokens, **outputs(tmp_path))
    usage = read_model_facts(tmp_path / "model").training.usage
    assert usage is not None
    assert usage["core_seconds"] == 2 * 3600.0
    assert result["core_hours"] == 2.0


@pytest.mark.long
def test_ranks_of_torchrun_stop_together(small: Small, tokens: Path, tmp_path: Path) -> None:
    import subprocess

    recipe = write_recipe(tmp_path / "recipe.json", small(checkpoints=str(tmp_path / "kept")))
    values = json.loads(recipe.read_text()) | {"budget": {"core_hours": 1e-6}}
    recipe.write_text(json.dumps(values))
    done = subprocess.run(
        command(recipe, tokens, tmp_path, 2), capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert "over budget: the run needs about" in done.stderr
