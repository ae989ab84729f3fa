"""A run that is cut is the run that was not: the same weights, to the bit, or a clear refusal."""

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

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import load_model
from nudge.components.train import loop
from nudge.components.train.checkpoints.checkpoint_store import _Folder, open_checkpoint_store
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
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the process meet its end after a step."""
    kept = TrainingLog.metric

    def cut(step: int) -> None:
        def metric(self: TrainingLog, values: dict[str, float]) -> None:
            if values["step"] == step and "loss" in values:
                raise KeyboardInterrupt
            kept(self, values)

        monkeypatch.setattr(TrainingLog, "metric", metric if step else kept)

    return cut


@pytest.mark.parametrize("values", [{}, {"mode": "lora"}, {"precision": "bfloat16"}])
def test_two_cuts_end_in_the_same_bits(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    cut_at: Callable[[int], None],
    values: dict[str, object],
) -> None:
    train(small(**values), tokens=tokens, **outputs(tmp_path / "whole"))
    settings = small(**values, checkpoints=str(tmp_path / "checkpoints"))
    for step in (5, 11):
        cut_at(step)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
        assert not (tmp_path / "cut" / "model").exists()
    cut_at(0)
    train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    kind = "validation_loss"
    assert lines(tmp_path / "cut", kind) == lines(tmp_path / "whole", kind)


def test_dropout_draws_the_same_after_a_cut(
    small: Small, tokens: Path, tmp_path: Path, cut_at: Callable[[int], None]
) -> None:
    shape = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
    fresh = {"mode": "scratch", "model_config": {**shape, "resid_pdrop": 0.3}}
    train(small(**fresh), tokens=tokens, **outputs(tmp_path / "whole"))
    settings = small(**fresh, checkpoints=str(tmp_path / "checkpoints"))
    cut_at(8)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    cut_at(0)
    train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.fixture
def half(
    small: Small, tokens: Path, tmp_path: Path, cut_at: Callable[[int], None]
) -> tuple[TrainSettings, Path]:
    """A run that was cut after step 10, with checkpoints of steps 6 and 9."""
    settings = small(checkpoints=str(tmp_path / "checkpoints"))
    cut_at(10)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    cut_at(0)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000006", "step-000000009"]
    return settings, folder


def test_a_checkpoint_cut_short_is_never_trusted(
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


def test_only_damaged_checkpoints_end_the_run(
    half: tuple[TrainSettings, Path], tokens: Path, tmp_path: Path
) -> None:
    settings, folder = half
    for shard in folder.glob("*/*.safetensors"):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(UserError, match="step-000000006 is damaged.*resume: never starts anew"):
        train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert not (tmp_path / "a" / "model").exists()


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    half: tuple[TrainSettings, Path], small: Small, tokens: Path, tmp_path: Path
) -> None:
    resume = str(half[1] / "step-000000009")
    settings = small(checkpoints=str(tmp_path / "other"), resume=resume, learning_rate=1e-3)
    differs = "train.learning_rate: 0.003 there, 0.001 here"
    with pytest.raises(UserError, match=f"is of another run: {differs}; resume with"):
        train(settings, tokens=tokens, **outputs(tmp_path / "a"))


def test_a_checkpoint_that_is_named_is_resumed_from_and_stays(
    half: tuple[TrainSettings, Path], small: Small, tokens: Path, tmp_path: Path
) -> None:
    settings, folder = half
    train(small(), tokens=tokens, **outputs(tmp_path / "whole"))
    older = dataclasses.replace(settings, resume=f"{folder}/step-000000006", checkpoints_kept=9)
    train(older, tokens=tokens, **outputs(tmp_path / "a"))
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000006", "step-000000009"]


def test_a_checkpoint_is_resumed_from_without_a_place_for_others(
    half: tuple[TrainSettings, Path],
    small: Small,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = []
    monkeypatch.setattr(loop, "accumulate", lambda *given: trained.append(0) or accumulate(*given))
    resume = (half[1] / "step-000000009").as_uri()
    train(small(resume=resume), tokens=tokens, **outputs(tmp_path / "a"))
    assert len(trained) == 3
    assert (half[1] / "step-000000009").is_dir()


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_checkpoint_that_is_not_there_is_said(
    half: tuple[TrainSettings, Path], small: Small, tokens: Path, tmp_path: Path, place: str
) -> None:
    resume = f"{half[1]}/step-000000007"
    settings = small(checkpoints=f"{tmp_path / place}" if place else "", resume=resume)
    with pytest.raises(UserError, match="resume = '.*000007': there is no checkpoint; give"):
        train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert len(list(half[1].iterdir())) == 2


def test_sigterm_writes_a_checkpoint_and_the_next_run_goes_on(
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


def test_a_finished_run_leaves_nothing_where_checkpoints_were(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "checkpoints"
    monkeypatch.setenv("NUDGE_CHECKPOINTS", str(place))
    train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    assert list(place.iterdir()) == []


def test_the_best_weights_are_kept_and_training_ends_early(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    values = {"learning_rate": 0.05, "validation_every": 1, "early_stopping": 3, "max_steps": 60}
    found = train(small(**values), tokens=tokens, **outputs(tmp_path / "a"))
    held_out = lines(tmp_path / "a", "validation_loss")
    best = min(held_out[1:])
    assert held_out.index(best) + 3 == found["steps"] < 60
    split = PackedSplit(tokens, "validation", 16, seed=1)
    settings = small(**values)
    kept = Network(load_model(tmp_path / "a" / "model"), settings)
    assert validation_loss(kept, split, settings) == pytest.approx(best, rel=1e-6)
    assert selected_on(tmp_path / "a") == split.documents_of(settings.validation_sequences) != []


def test_what_chose_the_weights_is_told_where_there_was_a_choice(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    for name, values, chosen in (
        ("last", {"validation_every": 4}, False),
        ("once", {"validation_every": 50, "keep": "best"}, False),  # at the end alone
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
    """Validation losses by step, to be filled in; each is what is written down for its step."""
    given: dict[int, float] = {}
    validated = TrainingState.validated
    monkeypatch.setattr(
        TrainingState, "validated", lambda self, loss: validated(self, given.get(self.step, loss))
    )
    return given


def training_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model" / "nudge.json").read_text())["training"])


def weights_of(folder: Path) -> int:
    return int(training_of(folder)["weights_of_step"])


def test_the_best_whose_checkpoint_failed_is_not_the_best(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    validations: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """That of step 4 meets a disk that is full for a moment; step 2 is the best that is there."""
    publish = _Folder.publish

    def full(self: _Folder, name: str, *given: Any) -> None:
        if name.endswith("4"):
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(self, name, *given)

    monkeypatch.setattr(_Folder, "publish", full)
    validations |= {2: 2.0, 4: 1.0, 6: 3.0, 8: 4.0, 10: 5.0, 12: 6.0}
    values = {"validation_every": 2, "checkpoints": str(tmp_path / "checkpoints")}
    settings = small(**values, keep="best")
    train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert "step-000000004 failed: no space is left there" in capfd.readouterr().err
    assert weights_of(tmp_path / "a") == 2
    assert training_of(tmp_path / "a")["best_validation_loss"] == 2.0
    monkeypatch.setattr(_Folder, "publish", publish)
    train(settings, tokens=tokens, **outputs(tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(tmp_path / "a")


def test_a_last_checkpoint_that_fails_costs_no_model(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = _Folder.publish

    def full(self: _Folder, name: str, *given: Any) -> None:
        if name.endswith("9"):
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(self, name, *given)

    monkeypatch.setattr(_Folder, "publish", full)
    settings = small(checkpoints=str(tmp_path / "checkpoints"))
    train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert weights_of(tmp_path / "a") == 12


def test_a_best_that_has_no_checkpoint_is_looked_for_anew(
    half: tuple[TrainSettings, Path],
    tokens: Path,
    tmp_path: Path,
    validations: dict[int, float],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The run kept the last ones until it was cut; the best validation was that of step 8."""
    settings = dataclasses.replace(half[0], keep="best", validation_every=1)
    validations |= {10: 8.0, 11: 7.0, 12: 9.0}
    train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    assert "of step 8, has no checkpoint: the best is looked" in capfd.readouterr().err
    assert weights_of(tmp_path / "a") == 11


def test_a_validation_that_is_no_number_is_never_the_best(
    small: Small, tokens: Path, tmp_path: Path, validations: dict[int, float]
) -> None:
    validations |= {4: 2.0, 8: 3.0, 12: math.nan}
    train(small(keep="best"), tokens=tokens, **outputs(tmp_path / "a"))
    assert weights_of(tmp_path / "a") == 4
    state = TrainingState()
    assert not state.validated(math.nan)
    assert state.validated(3.0)


def test_a_second_run_of_the_same_waits_for_the_first(
    small: Small, tokens: Path, tmp_path: Path, cut_at: Callable[[int], None]
) -> None:
    settings = small(checkpoints=str(tmp_path / "checkpoints"))
    cut_at(10)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tokens=tokens, **outputs(tmp_path / "a"))
    cut_at(0)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    kept = ["step-000000006", "step-000000009"]
    first, seen = contextlib.ExitStack(), []
    assert first.enter_context(open_checkpoint_store(str(folder)).held())

    def end() -> None:
        seen.append(sorted(path.name for path in folder.glob("step-*")))
        first.close()

    timer = threading.Timer(3.0, end)
    timer.start()
    train(settings, tokens=tokens, **outputs(tmp_path / "b"))
    timer.join()
    assert seen == [kept]


def test_with_ranks_that_would_not_wait_it_ends_at_once(small: Small, tmp_path: Path) -> None:
    settings = small(checkpoints=str(tmp_path))
    two = SimpleNamespace(world=2, main=True, sum=lambda *values: values)
    with open_checkpoints(settings, {}, Ranks()):
        (folder,) = tmp_path.iterdir()
        with (
            pytest.raises(UserError, match="another run of the same .* is at work: wait for its"),
            open_checkpoints(settings, {}, two),  # type: ignore[arg-type]
        ):
            pass
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_checkpoints_of_runs_that_were_given_up_go(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    cut_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not those of yesterday, nor of a run that is at work, nor anything else that lies there."""
    place = tmp_path / "checkpoints"
    monkeypatch.setenv("NUDGE_CHECKPOINTS", str(place))
    made: list[Path] = []
    cut_at(5)
    for seed in (2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(small(seed=seed), tokens=tokens, **outputs(tmp_path / "cut"))
        made += set(place.iterdir()) - set(made)
    cut_at(0)
    (place / "mine").mkdir()
    held, old, young = made
    long_ago = time.time() - 15 * 24 * 3600
    for path in (*held.iterdir(), held, *old.iterdir(), old, place / "mine"):
        os.utime(path, (long_ago, long_ago))
    with open_checkpoint_store(str(held)).held():
        os.utime(held, (long_ago, long_ago))
        os.utime(held / ".lock", (long_ago, long_ago))
        train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    assert set(place.iterdir()) == {held, young, place / "mine"}
    assert list(held.iterdir())


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_fifty_kills_end_in_the_same_bits(small: Small, tokens: Path, tmp_path: Path) -> None:
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
                assert started.poll() is None, "it ended before it could be killed 50 times"
                time.sleep(0.005)
            time.sleep(draw.random() * 0.1)
            started.kill()
        kills += 1
    train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
