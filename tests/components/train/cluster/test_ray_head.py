"""The head of a RayJob answers its probes and runs jobs: `ray start --head` as KubeRay starts it.

Ray comes from PyPI into an environment of its own: the test needs neither PyTorch nor the extra
`ray`.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.train.cluster import rayjob
from nudge.components.train.cluster.jobs import Step
from nudge.components.train.settings import LaunchSettings
from tests.components.train.cluster.test_rayjob import ray_containers
from tests.kubernetes_schemas import definition, schema

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

PATIENCE_S = 300.0
STARTS = 2
SLOW_AGENT = "Timed out waiting for file"
"""What the raylet logs when it ends itself because an agent did not report its port in time."""


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `ray` in the version of our images."""
    folder, uv = tmp_path_factory.mktemp("ray") / "venv", Path(sys.executable).with_name("uv")
    python = folder / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    wanted = f"ray[default]=={rayjob.RAY_VERSION}"
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, wanted],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"{wanted} cannot be installed here: {done.stderr.strip()[-300:]}")
    return folder / "bin" / "ray"


def options(ports: dict[str, int]) -> list[str]:
    """The options with which KubeRay starts the head of our RayJob.

    It adds those of `setMissingRayStartParams` and `generateRayStartCommand` in
    ray-operator/controllers/ray/common/pod.go (commit feeaf72f, 2026-08). ``ports`` are free ports
    of this machine, which replace the usual ones.
    """
    found = definition({"apiVersion": rayjob.KIND.api_version, "kind": "RayJob"})
    assert found
    body = rayjob.body(
        LaunchSettings(), name="n", handover="h", schema=schema(found), step=Step("i")
    )
    head = body["spec"]["rayClusterSpec"]["headGroupSpec"]
    parameters: dict[str, Any] = {**head["rayStartParams"], **ports}
    return [*(f"--{name}={value}" for name, value in sorted(parameters.items())), "--block"]


class Head:
    """A head that runs. It is started once more if a slow agent ended it, as in a pod.

    Ray 2.60 ends itself if its dashboard agent does not report its port within 15 s, which a busy
    machine may not manage (https://github.com/ray-project/ray/issues/65983). The test is skipped if
    that happens `STARTS` times, and fails if the head ends for any other reason.
    """

    def __init__(self, ray: Path) -> None:
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port")
        self._ray, self._ports = ray, {name: _free_port() for name in names}
        here = {each: f"http://127.0.0.1:{self._ports[each]}" for each in names}
        self.urls = {
            rayjob.DASHBOARD_PORT: here["dashboard-port"],
            rayjob.AGENT_PORT: here["dashboard-agent-listen-port"],
        }
        """The addresses of its ports, by the ports of a pod."""
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self._temporary = tempfile.mkdtemp(prefix="ray")  # Ray's sockets need a short path
        self._process = subprocess.Popen(
            [
                *(str(self._ray), "start", "--head", *options(self._ports)),
                # What a pod has for itself and this machine shares.
                *(f"--temp-dir={self._temporary}", "--min-worker-port=0", "--max-worker-port=0"),
                *("--object-store-memory=100000000", "--disable-usage-stats"),
            ],
            # As in a pod, which has no token in ~/.ray; NetworkPolicies protect the head there.
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            start_new_session=True,
        )

    def keep_running(self) -> None:
        if self._process.poll() is None:
            return
        logs = Path(self._temporary).glob("session_*/logs/raylet*")
        text = "".join(path.read_text(errors="replace") for path in logs)
        assert SLOW_AGENT in text, f"the head ended with {self._process.returncode}: {text[-3000:]}"
        if self.starts == STARTS:
            pytest.skip(f"Ray's agent took over 15 s to start here, {STARTS} times")
        self.stop()
        self._start()

    def stop(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        shutil.rmtree(self._temporary, ignore_errors=True)


@pytest.fixture
def head(ray: Path) -> Iterator[Head]:
    head = Head(ray)
    try:
        yield head
    finally:
        head.stop()


def _succeeds(url: str) -> bool:
    return "success" in _ask(url)


def test_a_head_answers_its_probes_and_runs_a_job(head: Head) -> None:
    probes = {
        (probe["httpGet"]["port"], probe["httpGet"]["path"])
        for container in ray_containers(LaunchSettings()).values()
        for probe in (container[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    }
    assert len(probes) == 2
    for port, path in sorted(probes):
        _until(head, functools.partial(_succeeds, f"{head.urls[port]}{path}"))
    print(f"the head answers after {head.starts} start(s)")
    jobs = f"{head.urls[rayjob.DASHBOARD_PORT]}/api/jobs/"
    assert json.loads(_ask(jobs)) == []
    # As the pod of the submitter does.
    made = json.loads(_ask(jobs, {"entrypoint": "echo $((6 * 7))"}))
    job = f"{jobs}{made['submission_id']}"
    _until(head, lambda: json.loads(_ask(job))["status"] == "SUCCEEDED")
    # Ray writes the entrypoint to the same log, and may do so after the job's own output.
    assert "42" in json.loads(_ask(f"{job}/logs"))["logs"].splitlines()


def _ask(url: str, body: dict[str, str] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def _until(head: Head, true: Callable[[], bool]) -> None:
    """Wait until a question is answered with true; raises its error, or fails, if it never is."""
    end = time.monotonic() + PATIENCE_S
    while True:
        head.keep_running()
        try:
            if true():
                return
        except OSError:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "not in time"
        time.sleep(1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
