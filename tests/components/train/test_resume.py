"""A run that is cut is the run that was not: the same weights, to the bit, or a clear refusal."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nudge.components.common.errors import UserError
from nudge.components.common.language_model import load_model
from nudge.components.train.data import PackedSplit
from nudge.components.train.loop import validation_loss
from nudge.components.train.network import Network
from nudge.components.train.record import Record
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train

from tests.components.train.conftest import command, lines, outputs, weights, write_recipe

Small = Callable[..., TrainSettings]


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the process meet its end after a step."""
    kept = Record.metric

    def cut(step: int) -> None:
        def metric(self: Record, values: dict[str, float]) -> None:
            if values["step"] == step and "loss" in values:
                raise KeyboardInterrupt
            kept(self, values)

        monkeypatch.setattr(Record, "metric", metric if step else kept)

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
