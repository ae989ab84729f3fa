"""Runs the tests of `on_a_device.py` in a process of their own.

PyTorch's autograd engine counts the device types once, at the first backward pass of a process, so
the second device must be registered before any other test trains.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests import second_device
from tests.components.train.conftest import command, lines, outputs, write_recipe

Small = Callable[..., TrainSettings]
CASES = Path(__file__).with_name("on_a_device.py")


pytestmark = pytest.mark.skipif(bool(second_device.why_not()), reason=second_device.why_not())


def test_every_path_runs_on_a_device_other_than_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", str(CASES)]
    done = subprocess.run(command, cwd=CASES.parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "values",
    [
        {"parallelism": "fsdp"},
        pytest.param({"parallelism": "ddp"}, marks=pytest.mark.long),
        pytest.param(
            {"parallelism": "fsdp", "mode": "lora", "learning_rate": 1e-2}, marks=pytest.mark.long
        ),
    ],
    ids=["fsdp", "ddp", "fsdp-lora"],
)
def test_two_ranks_on_the_device_have_the_losses_of_one_on_the_cpu(
    values: dict[str, Any], small: Small, tokens: Path, tmp_path: Path
) -> None:
    """Train, write a checkpoint, resume from it and export."""
    second_device._library()  # build it once, before both ranks need it
    settings = small(**values, max_steps=8, checkpoints=str(tmp_path / "checkpoints"))
    resumed = {"resume": "", "checkpoints": ""}
    for name in ("two", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "resumed":
            resumed["resume"] = str(min((tmp_path / "checkpoints").glob("*/step-*")))
            settings = small(**values, max_steps=8, **resumed)
        recipe = write_recipe(folder / "recipe.json", settings)
        done = subprocess.run(
            command(recipe, tokens, folder, ranks=2, module="tests.second_device.ranks"),
            env={**os.environ, "PYTHONPATH": str(CASES.parents[3])},
            capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    train(small(**values, max_steps=8), tokens=tokens, **outputs(tmp_path / "one"))
    for name in ("two", "resumed"):
        for kind in ("loss", "validation_loss"):
            here, there = (lines(tmp_path / each, kind) for each in ("one", name))
            assert there == pytest.approx(here, rel=1e-4)
        here_weights, there_weights = (
            load_file(tmp_path / each / "model" / "model.safetensors") for each in ("one", name)
        )
        assert here_weights.keys() == there_weights.keys()
        for key, tensor in here_weights.items():
            torch.testing.assert_close(there_weights[key], tensor, rtol=1e-2, atol=1e-4)
