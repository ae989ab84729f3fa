"""Ray Train runs the same training: two workers of a local Ray get the losses of one rank."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nudge.components.train.cluster.handover import Handover
from nudge.components.train.settings import LaunchSettings, TrainSettings
from nudge.components.train.train import train
from tests.components.train import spied_rank
from tests.components.train.conftest import lines, outputs, write_recipe
from tests.components.train.spied_rank import check_order

Small = Callable[..., TrainSettings]


def drive(settings: TrainSettings, tokens: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the driver of a RayJob on a Ray of this machine with two CPUs."""
    handover = Handover(str(folder / "handover"))
    folder.mkdir(parents=True, exist_ok=True)
    handover.send("recipe", write_recipe(folder / "recipe", settings))
    handover.send("tokens", tokens)
    script = (
        "import ray, sys; from nudge.components.train.cluster.ray_driver import main;"
        "hook = {'worker_process_setup_hook': 'tests.components.train.spied_rank.install'};"
        "ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8,"
        " runtime_env=hook); main()"
    )
    (folder / "rows").mkdir()
    return subprocess.run(
        [sys.executable, "-c", script, handover.uri],
        env={
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            **spied_rank.environment(folder / "rows"),
        },
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.long
def test_two_workers_of_ray_have_the_losses_of_one_rank(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    on_ray = LaunchSettings(nodes=2, gpus_per_node=0, cpu="1")
    done = drive(small(cluster=on_ray), tokens, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check_order(tmp_path / "rows", tokens, ranks=2, steps=12, rows=4)
    handover = Handover(str(tmp_path / "handover"))
    for name in ("model", "history", "report"):
        handover.fetch(name, tmp_path / "two" / name)
    train(small(), tokens=tokens, **outputs(tmp_path / "one"))
    for kind in ("loss", "validation_loss", "tokens"):
        one, two = (lines(tmp_path / name, kind) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5)
    assert "train: 12/12 steps" in done.stderr + done.stdout


@pytest.mark.long
def test_the_driver_ends_with_the_message_of_its_worker(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    on_ray = LaunchSettings(nodes=2, gpus_per_node=0, cpu="1")
    settings = small(cluster=on_ray, learning_rate=1e30, warmup_share=0.0)
    done = drive(settings, tokens, tmp_path)
    assert done.returncode == 2
    assert "error: training stopped before step 2: loss" in done.stderr
