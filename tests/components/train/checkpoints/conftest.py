"""Trainings that are interrupted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nudge.components.train.record import TrainingLog
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import outputs

Small = Callable[..., TrainSettings]


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Interrupt the process after a step; 0 stops interrupting."""
    original = TrainingLog.metric

    def interrupt(step: int) -> None:
        def metric(self: TrainingLog, values: dict[str, float]) -> None:
            if values["step"] == step and "loss" in values:
                raise KeyboardInterrupt
            original(self, values)

        monkeypatch.setattr(TrainingLog, "metric", metric if step else original)

    return interrupt


@pytest.fixture
def half(
    small: Small, tokens: Path, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> tuple[TrainSettings, Path]:
    """A run that was interrupted after step 10, with checkpoints of steps 6 and 9."""
    settings = small(checkpoints=str(tmp_path / "checkpoints"))
    interrupt_at(10)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    interrupt_at(0)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000006", "step-000000009"]
    return settings, folder
