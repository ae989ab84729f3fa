"""Ray Train runs the same training: two workers of a local Ray get the losses of one rank."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from nudge.components.train.cluster import rayjob
from nudge.components.train.cluster.handover import Handover
from nudge.components.train.settings import LaunchSettings, TrainSettings
from nudge.components.train.train import train
from tests.components.train import spied_rank
from tests.components.train.cluster.test_rayjob import ray_containers
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


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not os.environ.get("NUDGE_TEST_RAY_HEAD"),
    reason="the raylet's health endpoint has not answered on a busy two-core machine; set "
    "NUDGE_TEST_RAY_HEAD=1 to run it",
)
def test_a_head_of_ray_answers_the_probes_and_takes_jobs(tmp_path: Path) -> None:
    """`ray start --head`, as KubeRay starts it, with the ports of this machine that are free."""
    pytest.importorskip("ray")
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = {name: free_port() for name in names}
    temporary = tempfile.mkdtemp(prefix="ray")  # Ray's sockets need a short path
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *(f"--{name}={port}" for name, port in ports.items()),
        *("--num-cpus=0", "--num-gpus=0", "--dashboard-host=0.0.0.0", "--disable-usage-stats"),
        f"--temp-dir={temporary}",
        *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"),
    ]
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": "200"}
    head = subprocess.Popen(command, env=environment, start_new_session=True)
    here = {
        rayjob.DASHBOARD_PORT: ports["dashboard-port"],
        rayjob.AGENT_PORT: ports["dashboard-agent-listen-port"],
    }
    try:
        container = ray_containers(LaunchSettings())["ray-head"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]["httpGet"]
            url = f"http://127.0.0.1:{here[probe['port']]}{probe['path']}"
            assert "success" in answer(url, head)
        assert answer(f"http://127.0.0.1:{ports['dashboard-port']}/api/jobs/", head) == "[]"
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answer(url: str, server: subprocess.Popen[bytes], patience_s: float = 240) -> str:
    """The text at a URL, as soon as it answers with success."""
    end = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return str(response.read().decode())
        except OSError:
            if time.monotonic() > end or server.poll() is not None:
                raise
            time.sleep(1)
