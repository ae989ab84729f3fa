"""Report a TrainJob's progress, so that the cluster and its dashboard show it.

There are two ways, each used if its variable is set. OpenShift AI's controller polls the first pod:
the job has an annotation with a port, and ``/metrics`` on that port answers with JSON
(github.com/opendatahub-io/trainer, pkg/rhai). Kubeflow Trainer expects a request that sets
``status.trainerStatus``, with a token that its controller mounts (its KEP-2779). A failure of
either never stops a training.
"""

import contextlib
import json
import math
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nudge.components.common.core.say import say

PORT_VARIABLE = "NUDGE_METRICS_PORT"
SERVER_VARIABLE = "KUBEFLOW_TRAINER_SERVER_URL"
TOKEN_VARIABLE = "KUBEFLOW_TRAINER_SERVER_TOKEN"
CA_VARIABLE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
PORT = 28080
"""The port that OpenShift AI's controller polls by default; not one below 1024."""

INTERVAL_S = 5.0
TIMEOUT_S = 5.0


class JobStatus:
    """The newest figures of a run of ``steps`` steps; made by `open_job_status`."""

    def __init__(self, steps: int) -> None:
        self.changed = threading.Event()
        self._steps, self._step, self._left = steps, 0, None
        # Replaced, never changed in place: another thread may be reading them.
        self._training: dict[str, float] = {}
        self._validation: dict[str, float] = {}

    def metric(self, values: dict[str, Any]) -> None:
        """Take the figures of a step, like `Record.metric`."""
        known = {
            name: value
            for name, value in values.items()
            if name not in ("step", "eta_s") and value is not None and math.isfinite(value)
        }
        if "validation_loss" in known:
            self._validation = known
        else:
            self._training = known
        self._step, self._left = values["step"], values.get("eta_s", self._left)
        self.changed.set()

    def as_polled(self) -> dict[str, Any]:
        """The JSON that OpenShift AI's controller reads."""
        return {
            **self._progress(),
            "currentStep": self._step,
            "totalSteps": self._steps,
            "trainMetrics": self._training,
            "evalMetrics": self._validation,
        }

    def as_reported(self) -> dict[str, Any]:
        """The ``trainerStatus`` that Kubeflow Trainer accepts."""
        figures = {**self._training, **self._validation, "step": self._step, "steps": self._steps}
        return {
            **self._progress(),
            "lastUpdatedTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "metrics": [{"name": name, "value": f"{value:.6g}"} for name, value in figures.items()],
        }

    def _progress(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"progressPercentage": 100 * self._step // self._steps}
        if self._left is not None:
            shown["estimatedRemainingSeconds"] = round(self._left)
        return shown


@contextlib.contextmanager
def open_job_status(steps: int) -> Iterator[JobStatus]:
    """Report progress to the job's controller while the block runs, and once at its end."""
    status = JobStatus(steps)
    with contextlib.ExitStack() as stack:
        if port := os.environ.get(PORT_VARIABLE):
            stack.enter_context(_polled(status, int(port)))
        if url := os.environ.get(SERVER_VARIABLE):
            stack.enter_context(_reporting(status, url))
        yield status


@contextlib.contextmanager
def _polled(status: JobStatus, port: int) -> Iterator[None]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            body = json.dumps(status.as_polled()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = ThreadingHTTPServer(("", port), Answer, bind_and_activate=False)
    server.socket.close()
    try:
        server.socket = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        _warn(f"progress is not served at port {port}: {error}")
        yield
        return
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def _reporting(status: JobStatus, url: str) -> Iterator[None]:
    ended = threading.Event()

    def work() -> None:
        warned = False
        while not ended.wait(INTERVAL_S):
            if status.changed.is_set():
                status.changed.clear()
                warned = _report(status, url, warned)
        _report(status, url, warned)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _report(status: JobStatus, url: str, warned: bool) -> bool:
    """Send the newest figures; returns whether a failure has been reported by now."""
    import httpx

    try:
        authority = os.environ.get(CA_VARIABLE)
        # The CA and the token are renewed while the pod runs.
        context = ssl.create_default_context(cafile=authority) if authority else True
        token = Path(os.environ.get(TOKEN_VARIABLE, "")).read_text(encoding="utf-8").strip()
        headers = {"Authorization": f"Bearer {token}"}
        body = {"trainerStatus": status.as_reported()}
        httpx.post(
            url, json=body, headers=headers, timeout=TIMEOUT_S, verify=context
        ).raise_for_status()
    except (OSError, httpx.HTTPError) as error:
        if not warned:
            _warn(f"Kubeflow Trainer does not accept the progress: {error}")
        return True
    return warned


def _warn(text: str) -> None:
    say(f"warning: {text}; training continues")
