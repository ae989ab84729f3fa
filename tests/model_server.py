"""The laptop's own model server, as a process."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from nudge.components.common.local.processes import free_port
from nudge.components.deploy.smoke import ModelServer

TOKEN = "t" * 32
STARTS_S = 180


@contextlib.contextmanager
def running_model_server(folder: Path, name: str) -> Iterator[ModelServer]:
    """Serve the model in ``folder / name`` until the end; its token and log are in ``folder``."""
    token, log, port = folder / "token", folder / "log", free_port()
    token.write_text(TOKEN)
    command = [sys.executable, "-P", "-m", "nudge.components.deploy.local.model_server", name]
    command += [f"--port={port}", f"--token-file={token}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    server = ModelServer(f"http://127.0.0.1:{port}", TOKEN)
    try:
        _wait_until_healthy(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_healthy(server: ModelServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_S
    with server.client() as client:
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(f"the server is not healthy after {STARTS_S} s: {log.read_text()[-3000:]}")
