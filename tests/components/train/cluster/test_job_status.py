"""A TrainJob's progress: as OpenShift AI polls it and as Kubeflow Trainer receives it."""

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from nudge.components.train.cluster import job_status
from nudge.components.train.cluster.job_status import open_job_status
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import outputs
from tests.kubernetes_schemas import problems

TOKEN = "a-token-of-the-pod"
STEP = {"step": 3, "loss": 2.5, "tokens": 96, "mfu": None, "eta_s": 7.4}


class Trainer:
    """Kubeflow Trainer's status server, over TLS."""

    def __init__(self, authority: trustme.CA) -> None:
        self.received: list[tuple[str, Any]] = []
        self.status = 200
        server = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.received.append((self.headers["Authorization"], body))
                self.send_response(server.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    (tmp_path / "token").write_text(TOKEN)
    found = Trainer(authority)
    port = found.server.server_address[1]
    monkeypatch.setenv(job_status.SERVER_VARIABLE, f"https://127.0.0.1:{port}/status")
    monkeypatch.setenv(job_status.TOKEN_VARIABLE, str(tmp_path / "token"))
    monkeypatch.setenv(job_status.CA_VARIABLE, str(tmp_path / "ca.crt"))
    monkeypatch.setattr(job_status, "INTERVAL_S", 0.02)
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()


def ask(port: int, path: str = "/metrics") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_openshift_ai_polls_the_progress(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv(job_status.PORT_VARIABLE, str(port))
    with open_job_status(12) as status:
        status.metric({"step": 0, "validation_loss": 3.0})
        status.metric(STEP)
        code, body = ask(port)
        assert (code, json.loads(body)) == (
            200,
            {
                "progressPercentage": 25,
                "estimatedRemainingSeconds": 7,
                "currentStep": 3,
                "totalSteps": 12,
                "trainMetrics": {"loss": 2.5, "tokens": 96},
                "evalMetrics": {"validation_loss": 3.0},
            },
        )
        assert ask(port, "/")[0] == 404
        with open_job_status(12):  # the port is taken
            pass
        assert ask(port)[0] == 200
    assert f"progress is not served at port {port}" in capfd.readouterr().err
    with pytest.raises(ConnectionRefusedError):
        ask(port)


def test_kubeflow_trainer_receives_the_progress(
    trainer: Trainer, small: Callable[..., TrainSettings], tokens: Path, tmp_path: Path
) -> None:
    train(small(), tokens=tokens, **outputs(tmp_path / "out"))
    assert {authorization for authorization, _ in trainer.received} == {f"Bearer {TOKEN}"}
    for _, body in trainer.received:
        job = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob"}
        spec = {"runtimeRef": {"name": "torch-distributed"}}
        assert problems({**job, "metadata": {"name": "n"}, "spec": spec, "status": body}) == []
    last = trainer.received[-1][1]["trainerStatus"]
    assert (last["progressPercentage"], last["estimatedRemainingSeconds"]) == (100, 0)
    figures = {metric["name"]: metric["value"] for metric in last["metrics"]}
    assert (figures["step"], figures["steps"]) == ("12", "12")
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "validation_loss"} <= set(figures)


@pytest.mark.parametrize("fault", ["refused", "another authority", "no token"])
def test_a_server_that_refuses_progress_stops_no_training(
    trainer: Trainer, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    if fault == "refused":
        trainer.status = 403
    elif fault == "no token":
        (tmp_path / "token").unlink()
    else:
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    with open_job_status(12) as status:
        for step in range(5):
            status.metric({**STEP, "step": step})
            time.sleep(0.05)
    printed = capfd.readouterr().err
    assert printed.count("does not accept the progress") == 1
    assert TOKEN not in printed
    if fault != "refused":
        assert trainer.received == []
