"""Stopping servers on KServe: what to wait for, and for how long."""

import subprocess
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nudge.components.common.clients.kube import connect
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.deploy.deploy import deploy
from nudge.components.deploy.kserve import lifecycle, objects
from nudge.components.deploy.kserve.kserve import KServe
from nudge.components.deploy.settings import DeploySettings
from tests.components.deploy.kserve_cluster import SETTINGS, ServingCluster
from tests.components.deploy.kserve_servers import ModelServer
from tests.components.deploy.test_kserve_readiness import MODEL, version


def test_a_candidate_that_had_no_traffic_is_not_drained(
    cluster: ServingCluster, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(SETTINGS, registered_model=model, version="v1")
    monkeypatch.setattr(lifecycle, "QUIET_S", 60.0)
    began = time.monotonic()
    with pytest.raises(UserError, match="the smoke test of .* odd failed"):
        deploy(SETTINGS, registered_model=model, version="odd")
    assert time.monotonic() - began < 45
    assert (cluster.weights(), cluster.up()) == ({"v1": 100}, {"v1"})


def retire_v1(cluster: ServingCluster, **values: Any) -> float:
    """Seconds that it takes to stop a version that had all the traffic."""
    settings = parse(DeploySettings, {"target": "kserve", "kserve": values}, "deploy")
    target = KServe(connect(), settings)
    with target.exclusive(MODEL):
        target.bring_up(version())
        target.move(MODEL, {"v1": 100})
        began = time.monotonic()
        target.retire(MODEL, set())
    assert cluster.up() == set()
    return time.monotonic() - began


def test_a_server_without_request_metrics_is_not_busy(
    cluster: ServingCluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lifecycle, "requests_in_flight", lambda client: None)
    assert retire_v1(cluster, request_timeout_s=60) < 30
    assert "stops when" not in capfd.readouterr().err


def test_draining_is_announced(
    cluster: ServingCluster, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make = ModelServer.__init__

    def busy(self: ModelServer, *arguments: Any) -> None:
        make(self, *arguments)
        self._running = 2

    monkeypatch.setattr(ModelServer, "__init__", busy)
    assert retire_v1(cluster, request_timeout_s=3) >= 3
    assert capfd.readouterr().err.count("v1 stops when its 2 requests finish, or in 3 s") == 1


def test_the_grace_period_of_a_pod_follows_the_request_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_S3_BUCKET", "bucket")
    settings = replace(SETTINGS, kserve=replace(SETTINGS.kserve, request_timeout_s=900))
    predictor = objects.inference_service(version(), settings)["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] == 900 + objects.GRACE_S
    command = predictor["model"]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["/bin/sh", "-c"]
    assert "sleep 900" in command[2]
    assert "time.monotonic() + 900" in command[3]


class Metrics(BaseHTTPRequestHandler):
    text = ""
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts the preStop hook of a pod whose server has the `Metrics`."""
    monkeypatch.setattr(objects, "SETTLES_S", 3)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def start(longest_s: int) -> subprocess.Popen[bytes]:
        *shell, script = objects._until_quiet(longest_s)
        assert ":8080/" in script
        port = f":{server.server_address[1]}/"
        return subprocess.Popen([*shell, script.replace(":8080/", port)])

    yield start
    server.shutdown()
    server.server_close()


def test_the_hook_waits_until_no_request_is_in_flight(
    hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Metrics, "text", 'vllm:num_requests_running{engine="0"} 1.0\n')
    process = hook(300)
    time.sleep(6)
    assert process.poll() is None
    Metrics.text = 'vllm:num_requests_running{engine="0"} 0.0\n'
    assert process.wait(30) == 0


def test_without_request_metrics_the_hook_waits_for_the_request_timeout(
    hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Metrics, "status", 404)
    began = time.monotonic()
    assert hook(8).wait(60) == 0
    assert time.monotonic() - began >= 8


def test_a_token_is_not_sent_in_plain_text(cluster: ServingCluster) -> None:
    target = KServe(connect(), SETTINGS)
    with pytest.raises(UserError, match="http://m.example.com asks for a token, .* https only"):
        target._server("http://m.example.com")
    assert target._server("https://m.example.com").token == cluster.api.token
    no_token = replace(SETTINGS, kserve=replace(SETTINGS.kserve, authentication=False))
    assert KServe(connect(), no_token)._server("http://m.example.com").token == ""
