"""A folder of checkpoints that several runs use: what is locked, and what is removed."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.train.checkpoints.checkpoint_store import CheckpointStore
from nudge.components.train.checkpoints.open_checkpoints import open_checkpoints
from nudge.components.train.ranks import Ranks
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import outputs

Small = Callable[..., TrainSettings]


def test_a_finished_run_removes_its_checkpoints(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    monkeypatch.setenv("NUDGE_CHECKPOINTS", str(root))
    train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    assert list(root.iterdir()) == []


def test_a_second_run_with_the_same_identity_waits_for_the_first(
    small: Small, tokens: Path, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    settings = small(checkpoints=str(tmp_path / "checkpoints"))
    interrupt_at(10)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    interrupt_at(0)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    kept = ["step-000000006", "step-000000009"]
    first, seen = contextlib.ExitStack(), []
    assert first.enter_context(CheckpointStore(str(folder)).lock())

    def end() -> None:
        seen.append(sorted(path.name for path in folder.glob("step-*")))
        first.close()

    timer = threading.Timer(3.0, end)
    timer.start()
    train(settings, tokens=tokens, **outputs(tmp_path / "b"))
    timer.join()
    assert seen == [kept]


def test_a_second_run_with_two_ranks_fails_at_once(small: Small, tmp_path: Path) -> None:
    settings = small(checkpoints=str(tmp_path))
    two = SimpleNamespace(world=2, main=True, sum=lambda *values: values)
    with open_checkpoints(settings, {}, Ranks()):
        (folder,) = tmp_path.iterdir()
        with (
            pytest.raises(
                UserError, match="another run with the same .* is active .*: wait until it"
            ),
            open_checkpoints(settings, {}, two),  # type: ignore[arg-type]
        ):
            pass
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_checkpoints_of_abandoned_runs_are_removed(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recent ones, those of an active run and unrelated files stay."""
    root = tmp_path / "checkpoints"
    monkeypatch.setenv("NUDGE_CHECKPOINTS", str(root))
    made: list[Path] = []
    interrupt_at(5)
    for seed in (2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(small(seed=seed), tokens=tokens, **outputs(tmp_path / "cut"))
        made += set(root.iterdir()) - set(made)
    interrupt_at(0)
    (root / "mine").mkdir()
    active, old, recent = made
    long_ago = time.time() - 15 * 24 * 3600
    for path in (*active.iterdir(), active, *old.iterdir(), old, root / "mine"):
        os.utime(path, (long_ago, long_ago))
    with CheckpointStore(str(active)).lock():
        os.utime(active, (long_ago, long_ago))
        os.utime(active / ".lock", (long_ago, long_ago))
        train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    assert set(root.iterdir()) == {active, recent, root / "mine"}
    assert list(active.iterdir())
