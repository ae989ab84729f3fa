"""A real MLflow server over SQLite, on a free port of 127.0.0.1."""

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nudge.components.common.local.processes import free_port

STARTS_S = 240.0
"""How long the server may take to start, including its download."""


def version() -> str:
    """The version of the installed client, mlflow-skinny; skips the test if there is none."""
    try:
        return importlib.metadata.version("mlflow-skinny")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mlflow is not installed")


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The server's URL. MLFLOW_TEST_SERVER names one that runs already."""
    if running := os.environ.get("MLFLOW_TEST_SERVER"):
        version()
        yield running
        return
    port = free_port()
    command = [
        # In an environment of its own: the server pins older releases of what nudge uses.
        *(sys.executable, "-m", "uv", "tool", "run", "--from", f"mlflow=={version()}"),
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"),
        *("--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"),
    ]
    log = folder / "mlflow.log"
    variables = {key: each for key, each in os.environ.items() if not key.startswith("MLFLOW_")}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + STARTS_S
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(20)
