"""Two ranks under torchrun equal one rank: the same samples, and the same losses up to rounding."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nudge.components.common.core.errors import UserError
from nudge.components.train.settings import TrainSettings, WatchedPrompt
from nudge.components.train.train import train
from tests.components.train.conftest import (
    command,
    lines,
    outputs,
    run,
    weights,
    write_recipe,
)
from tests.components.train.spied_rank import check_order

Small = Callable[..., TrainSettings]


@pytest.fixture(scope="module")
def alone(tokens: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.components.train.conftest import SMALL

    folder = tmp_path_factory.mktemp("alone")
    train(TrainSettings(base_model=str(tiny_model), **SMALL), tokens=tokens, **outputs(folder))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"parallelism": "fsdp"},
        pytest.param({"parallelism": "ddp"}, marks=pytest.mark.long),
        # Three rows for two ranks: one of them has padding.
        pytest.param({"batch_sequences": 3, "validation_sequences": 1}, marks=pytest.mark.long),
        pytest.param({"mode": "lora", "precision": "bfloat16"}, marks=pytest.mark.long),
    ],
)
def test_two_ranks_have_the_losses_of_one(
    small: Small, tokens: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    watch = WatchedPrompt(prompt="The Tower", target=" in 1969")  # a target of several tokens
    settings = small(watch=watch, **values)
    (tmp_path / "rows").mkdir()
    run(settings, tokens, tmp_path / "two", ranks=2, rows=tmp_path / "rows")
    if "batch_sequences" not in values:
        check_order(tmp_path / "rows", tokens, ranks=2, steps=12, rows=4)
    train(settings, tokens=tokens, **outputs(tmp_path / "one"))
    tolerance = 2e-3 if values.get("precision") == "bfloat16" else 1e-5
    for kind in ("loss", "validation_loss", "tokens"):
        one, two = (lines(tmp_path / name, kind) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=tolerance)
    one, two = (watched(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=10 * tolerance, abs=0)
    one_model, two_models = (load_file(tmp_path / name / "model" / "model.safetensors")
                             for name in ("one", "two"))  # fmt: skip
    assert one_model.keys() == two_models.keys()
    for key, tensor in one_model.items():
        torch.testing.assert_close(two_models[key], tensor, rtol=1e-2, atol=1e-4)


def watched(folder: Path) -> list[float]:
    history = (folder / "history" / "probes.jsonl").read_text().splitlines()
    return [json.loads(line)["p"] for line in history]


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_run_resumes_with_another_number_of_ranks(
    small: Small, tokens: Path, alone: Path, tmp_path: Path, mode: str, before: int, after: int
) -> None:
    settings = small(mode=mode, checkpoints=str(tmp_path / "checkpoints"), checkpoints_kept=9)
    expected = alone
    if mode == "lora":
        expected = tmp_path / "alone"
        train(small(mode=mode), tokens=tokens, **outputs(expected))
    run(settings, tokens, tmp_path / "before", ranks=before if before > 1 else 0)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    for later in ("step-000000009", "step-000000006"):
        shutil.rmtree(folder / later)
    _check_shards(folder / "step-000000003", before)
    run(settings, tokens, tmp_path / "after", ranks=after if after > 1 else 0)
    for kind in ("loss", "validation_loss"):
        found = lines(tmp_path / "after", kind)
        assert found == pytest.approx(lines(expected, kind), rel=1e-5)
    assert lines(tmp_path / "after", "tokens") == lines(expected, "tokens")


def _check_shards(checkpoint: Path, ranks: int) -> None:
    """Each rank wrote one file, with its share of the tensors."""
    files = sorted(checkpoint.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    assert len(files) == ranks
    assert max(sizes) < 1.2 * sum(sizes) / ranks


@pytest.mark.long
def test_the_step_starts_its_own_ranks(
    small: Small, tokens: Path, alone: Path, tmp_path: Path
) -> None:
    results = train(small(processes=2), tokens=tokens, **outputs(tmp_path))
    assert results["steps"] == 12
    assert lines(tmp_path) == pytest.approx(lines(alone), rel=1e-5)


def test_the_step_raises_the_error_of_its_rank(small: Small, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora_targets"):
        train(
            small(processes=2, mode="lora", lora_targets=["no_such"]),
            tokens=tokens,
            **outputs(tmp_path),
        )
    assert not (tmp_path / "model").exists()


@pytest.mark.long
def test_a_rank_that_dies_ends_the_run_and_the_next_run_resumes(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    values = {"max_steps": 300, "epochs": 99.0, "checkpoints": str(tmp_path / "checkpoints")}
    recipe = write_recipe(tmp_path / "recipe.json", small(**values))
    line = command(recipe, tokens, tmp_path / "cut", ranks=2)
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as started:
        while not list((tmp_path / "checkpoints").glob("*/step-*")):
            assert started.poll() is None
            time.sleep(0.05)
        children = psutil.Process(started.pid).children(recursive=True)
        ranks = [p for p in children if "nudge.components.train" in p.cmdline()]
        os.kill(ranks[-1].pid, signal.SIGKILL)
        assert started.wait(timeout=60) != 0
    assert not (tmp_path / "cut" / "model").exists()
    run(small(**values), tokens, tmp_path / "cut", ranks=2)
    found = lines(tmp_path / "cut", "step")
    assert sorted(set(found)) == sorted(range(301))


STEP = """
import sys
from pathlib import Path
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.core.step import exit_with_user_errors
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train

recipe, tokens, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
with exit_with_user_errors():
    settings = step_settings(TrainSettings, "train", recipe)
    train(settings, tokens=tokens, **{n: folder / n for n in ("model", "history", "report")})
"""
"""What the step's face does, in a separate process."""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_sigterm_to_the_step_makes_its_ranks_write_a_checkpoint(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    values = {"max_steps": 60, "epochs": 99.0, "processes": 2, "checkpoint_every": 1000}
    settings = small(**values, checkpoints=str(tmp_path / "checkpoints"))
    recipe = write_recipe(tmp_path / "recipe.json", settings)
    words = [sys.executable, "-c", STEP, recipe.as_uri(), str(tokens), str(tmp_path / "cut")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as started:
        while not written(tmp_path / "cut", 3):
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(signal.SIGTERM)
        _, seen = started.communicate(timeout=120)
    assert started.returncode == 2, seen[-3000:]
    assert "stopped by SIGTERM after step" in seen
    assert not (tmp_path / "cut" / "model").exists()
    (kept,) = (tmp_path / "checkpoints").glob("*/step-*/manifest.json")
    assert 3 <= int(kept.parent.name.removeprefix("step-")) < 60
    train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    train(small(**values), tokens=tokens, **outputs(tmp_path / "whole"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def written(folder: Path, steps: int) -> bool:
    """Whether an unfinished run has written the figures of at least ``steps`` steps."""
    found = list(folder.glob(".history.part-*/metrics.jsonl"))
    return bool(found) and found[0].read_text().count('"loss"') >= steps
