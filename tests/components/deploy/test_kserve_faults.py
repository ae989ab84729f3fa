"""KServe as a target under faults: killed at every boundary, and with a failing API and registry.
A stream of users notices none of it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import find_served
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.deploy import deploy, serve
from tests.components.deploy.kserve_cluster import SETTINGS, ServingCluster
from tests.components.deploy.stream import Stream
from tests.faulty_proxy import FaultyProxy

RUNS = int(os.environ.get("NUDGE_TEST_FAULTY_RUNS", "20"))
BOUNDARIES = [
    (verb, plural, moment)
    for verb, plural in (
        *(("patch", "inferenceservices"), ("patch", "routes")),
        *(("PATCH", "registry"), ("delete", "inferenceservices")),
    )
    for moment in ("before", "after")
]
CASES = [
    pytest.param(
        boundary,
        retry,
        id=f"{'-'.join(boundary)}-{retry}",
        # One case, at the worst moment, runs every day.
        marks=[] if boundary[1:] == ("routes", "after") and retry == "finish" else pytest.mark.long,
    )
    for boundary in BOUNDARIES
    for retry in ("finish", "undo")
]


def promote_and_kill(
    cluster: ServingCluster,
    model: str,
    version: str,
    boundary: tuple[str, str, str],
    registry: FaultyProxy,
) -> None:
    """Promote in a separate process, and SIGKILL it at its first request of this kind."""
    verb, plural, moment = boundary
    child: list[subprocess.Popen[bytes]] = []
    answer = cluster.api._do

    def kill() -> None:
        child[0].send_signal(signal.SIGKILL)
        child[0].wait()

    def answer_or_kill(request: Any, asked: str, part: Any, kind: Any, body: Any) -> Any:
        met = (asked, part["plural"]) == (verb, plural) and child[0].poll() is None
        if met and moment == "before":
            kill()
            raise ConnectionError
        done = answer(request, asked, part, kind, body)
        if met:
            kill()
        return done

    def registry_or_kill(method: str, path: str) -> bool:
        met = (method, "registry") == (verb, plural) and child[0].poll() is None
        if met:
            registry.planned.append("reset" if moment == "before" else "lost")
            kill()
        return met

    cluster.api._do = answer_or_kill  # type: ignore[method-assign,assignment]
    registry.only = registry_or_kill
    command = [sys.executable, "-m", "tests.components.deploy.kserve_promote", model, version]
    child.append(
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "NUDGE_REGISTRY_URL": registry.url},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    )
    assert child[0].wait(120) == -signal.SIGKILL, "it ended before the boundary"
    cluster.api._do = answer  # type: ignore[method-assign]


@pytest.mark.long
@pytest.mark.parametrize(("boundary", "retry"), CASES)
def test_a_killed_promote_can_be_finished_or_undone(
    cluster: ServingCluster, model: str, registry: str, boundary: tuple[str, str, str], retry: str
) -> None:
    endpoint = deploy(SETTINGS, registered_model=model, version="v1")["endpoint"]
    stream = Stream(endpoint, model, cluster.api.token)
    try:
        with FaultyProxy(registry, share=0) as proxy:
            promote_and_kill(cluster, model, "v2", boundary, proxy)
        assert cluster.weights() in ({"v1": 100}, {"v2": 100})
        assert set(cluster.weights()) <= cluster.up(), "users are sent to a version that is not up"
        wanted = "v2" if retry == "finish" else "v1"
        deploy(SETTINGS, registered_model=model, version=wanted)
    finally:
        stream.stop()
    assert stream.faults == []
    assert (cluster.weights(), cluster.up()) == ({wanted: 100}, {wanted})
    assert (len(cluster.api.all("Route")), len(cluster.api.all("Lease"))) == (1, 1)
    served = with_registry(registry, find_served(model))
    assert served is not None
    assert served.main == wanted


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_faulty_api_and_registry(
    cluster: ServingCluster,
    model: str,
    registry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every run succeeds or fails cleanly, and no user reaches a version that must not serve."""
    endpoint = deploy(SETTINGS, registered_model=model, version="v1")["endpoint"]
    runs: list[dict[str, int]] = [
        {"v2": 100}, {"bad": 100}, {"v2": 60, "v3": 40}, {"odd": 100}, {"v1": 100},
    ]  # fmt: skip
    outcomes = {"succeeded": 0, "failed": 0}
    stream = Stream(endpoint, model, cluster.api.token, clients=1)
    with (
        FaultyProxy(cluster.api.url, seed=1, slow_s=0.1) as api,
        FaultyProxy(registry, seed=2, slow_s=0.1) as behind,
    ):
        direct, cluster.api.url = cluster.api.url, api.url
        monkeypatch.setenv("KUBECONFIG", str(cluster.api.kubeconfig(tmp_path)))
        monkeypatch.setenv("NUDGE_REGISTRY_URL", behind.url)
        cluster.api.url = direct
        for number in range(RUNS):
            shares = runs[number % len(runs)]
            before = cluster.weights()
            try:
                serve(SETTINGS, model, shares)
                message = ""
            except UserError as error:
                message = str(error)
            outcomes["failed" if message else "succeeded"] += 1
            assert cluster.weights() in ([before, shares] if message else [shares])
            assert cluster.api.token not in message
            assert not {"bad", "odd"} & set(cluster.weights())
            assert set(cluster.weights()) <= cluster.up()
        hurt = api.hurt + behind.hurt
    stream.stop()
    assert stream.faults == []
    monkeypatch.setenv("KUBECONFIG", str(cluster.api.kubeconfig(tmp_path)))
    monkeypatch.setenv("NUDGE_REGISTRY_URL", registry)
    with contextlib.suppress(UserError):
        deploy(SETTINGS, registered_model=model, version="bad")
    deploy(SETTINGS, registered_model=model, version="v1")
    assert (cluster.weights(), cluster.up()) == ({"v1": 100}, {"v1"})
    print(f"{RUNS} runs, {hurt} faults: {outcomes}, {stream.answered} user requests")
    assert hurt > RUNS
    assert outcomes["succeeded"] >= RUNS * 0.4  # three of the five shares can be served
