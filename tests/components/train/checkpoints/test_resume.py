"""An interrupted run ends with the same weights, bit for bit, or with a clear error."""

import dataclasses
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nudge.components.common.core.errors import UserError
from nudge.components.train import loop
from nudge.components.train.loop import accumulate
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import command, lines, outputs, weights, write_recipe

Small = Callable[..., TrainSettings]


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


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_fifty_kills_give_the_same_bits(small: Small, tokens: Path, tmp_path: Path) -> None:
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
