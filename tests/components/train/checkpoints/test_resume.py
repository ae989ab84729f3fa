"""An interrupted run ends with the same weights, bit for bit, or with a clear error."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import load_model
from nudge.components.train import loop
from nudge.components.train.checkpoints.checkpoint_store import CheckpointStore
from nudge.components.train.checkpoints.open_checkpoints import open_checkpoints
from nudge.components.train.checkpoints.training_state import TrainingState
from nudge.components.train.data import PackedSplit
from nudge.components.train.loop import accumulate, validation_loss
from nudge.components.train.network import Network
from nudge.components.train.ranks import Ranks
from nudge.components.train.record import TrainingLog
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import command, lines, outputs, weights, write_recipe

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


@pytest.mark.parametrize("values", [{}, {"mode": "lora"}, {"precision": "bfloat16"}])
def test_two_interruptions_give_the_same_bits(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
    values: dict[str, object],
) -> None:
    train(small(**values), tokens=tokens, **outputs(tmp_path / "whole"))
    settings = small(**values, checkpoints=str(tmp_path / "checkpoints"))
    for step in (5, 11):
        interrupt_at(step)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
        assert not (tmp_path / "cut" / "model").exists()
    interrupt_at(0)
    train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    kind = "validation_loss"
    assert lines(tmp_path / "cut", kind) == lines(tmp_path / "whole", kind)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_checkpoint_contains_only_what_is_trained(
    small: Small, tokens: Path, tmp_path: Path, mode: str
) -> None:
    settings = small(mode=mode, max_steps=2, checkpoint_every=1, checkpoints=str(tmp_path / "c"))
    train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    (folder,) = (tmp_path / "c").iterdir()
    names: set[str] = set()
    for file in (folder / "step-000000001").glob("*.safetensors"):
        names |= load_file(file).keys()
    trained = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert names == {
        f"{part}.{name}"
        for name in trained
        for part in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    }
    assert all("lora_" in name for name in trained) == (mode == "lora")
    assert trained


def test_dropout_is_the_same_after_an_interruption(
    small: Small, tokens: Path, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    shape = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
    fresh = {"mode": "scratch", "model_config": {**shape, "resid_pdrop": 0.3}}
    train(small(**fresh), tokens=tokens, **outputs(tmp_path / "whole"))
    settings = small(**fresh, checkpoints=str(tmp_path / "checkpoints"))
    interrupt_at(8)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    interrupt_at(0)
    train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


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


def test_a_truncated_checkpoint_is_skipped(
    half: tuple[TrainSettings, Path],
    tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings, folder = half
    shard = next((folder / "step-000000009").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert "step-000000009 is damaged" in capfd.readouterr().err
    assert len(lines(tmp_path / "a")) == 12


def test_the_run_fails_if_all_checkpoints_are_damaged(
    half: tuple[TrainSettings, Path], tokens: Path, tmp_path: Path
) -> None:
    settings, folder = half
    for shard in folder.glob("*/*.safetensors"):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(UserError, match="step-000000006 is damaged.*resume: never to start over"):
        train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert not (tmp_path / "a" / "model").exists()


def test_a_checkpoint_from_another_run_is_rejected_with_the_differences(
    half: tuple[TrainSettings, Path], small: Small, tokens: Path, tmp_path: Path
) -> None:
    resume = str(half[1] / "step-000000009")
    settings = small(checkpoints=str(tmp_path / "other"), resume=resume, learning_rate=1e-3)
    difference = "train.learning_rate: 0.003 there, 0.001 here"
    with pytest.raises(UserError, match=f"is from another run: {difference}; resume with"):
        train(settings, tokens=tokens, **outputs(tmp_path / "a"))


def test_a_named_checkpoint_is_resumed_from_and_kept(
    half: tuple[TrainSettings, Path], small: Small, tokens: Path, tmp_path: Path
) -> None:
    settings, folder = half
    train(small(), tokens=tokens, **outputs(tmp_path / "whole"))
    older = dataclasses.replace(settings, resume=f"{folder}/step-000000006", checkpoints_kept=9)
    train(older, tokens=tokens, **outputs(tmp_path / "a"))
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000006", "step-000000009"]


def test_a_run_without_a_checkpoint_store_resumes_from_a_named_checkpoint(
    half: tuple[TrainSettings, Path],
    small: Small,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = []

    def counting(*arguments: Any) -> Any:
        trained.append(0)
        return accumulate(*arguments)

    monkeypatch.setattr(loop, "accumulate", counting)
    resume = (half[1] / "step-000000009").as_uri()
    train(small(resume=resume), tokens=tokens, **outputs(tmp_path / "a"))
    assert len(trained) == 3
    assert (half[1] / "step-000000009").is_dir()


@pytest.mark.parametrize("store", ["", "checkpoints"])
def test_a_missing_checkpoint_is_an_error(
    half: tuple[TrainSettings, Path], small: Small, tokens: Path, tmp_path: Path, store: str
) -> None:
    resume = f"{half[1]}/step-000000007"
    settings = small(checkpoints=f"{tmp_path / store}" if store else "", resume=resume)
    with pytest.raises(UserError, match="resume = '.*000007': no checkpoint exists there; set it"):
        train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert len(list(half[1].iterdir())) == 2


def test_sigterm_writes_a_checkpoint_and_the_next_run_resumes(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    values = {"max_steps": 400, "epochs": 99.0, "validation_every": 0}
    settings = small(**values, checkpoints=str(tmp_path / "checkpoints"), checkpoint_every=1000)
    recipe = write_recipe(tmp_path / "recipe.json", settings)
    with subprocess.Popen(
        command(recipe, tokens, tmp_path / "cut"), stderr=subprocess.PIPE, text=True
    ) as started:
        while not any((tmp_path / "cut").glob(".history.part-*/metrics.jsonl")):
            time.sleep(0.05)
        metrics = next((tmp_path / "cut").glob(".history.part-*/metrics.jsonl"))
        while metrics.read_text().count("\n") < 20:
            time.sleep(0.02)
        started.send_signal(signal.SIGTERM)
        error = started.communicate(timeout=60)[1]
    assert started.returncode == 2
    assert "stopped by SIGTERM after step" in error
    assert len(list((tmp_path / "checkpoints").glob("*/step-*/manifest.json"))) == 1
    train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    train(small(**values), tokens=tokens, **outputs(tmp_path / "whole"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_finished_run_removes_its_checkpoints(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    monkeypatch.setenv("NUDGE_CHECKPOINTS", str(root))
    train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    assert list(root.iterdir()) == []


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


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_fifty_kills_give_the_same_bits(small: Small, tokens: Path, tmp_path: Path) -> None:
    import random

    draw = random.Random(7)
    values = {"max_steps": 700, "epochs": 999.0, "validation_every": 50}
    train(small(**values), tokens=tokens, **outputs(tmp_path / "whole"))
    settings = small(**values, checkpoints=str(tmp_path / "checkpoints"), checkpoint_every=5)
    recipe = write_recipe(tmp_path / "recipe.json", settings)
    kills = 0
    while kills < 50:
        with subprocess.Popen(
            command(recipe, tokens, tmp_path / "cut"), stderr=subprocess.DEVNULL
        ) as started:
            before = set((tmp_path / "checkpoints").glob("*/step-*"))
            while not set((tmp_path / "checkpoints").glob("*/step-*")) - before:
                assert started.poll() is None, "the run ended before it could be killed 50 times"
                time.sleep(0.005)
            time.sleep(draw.random() * 0.1)
            started.kill()
        kills += 1
    train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
