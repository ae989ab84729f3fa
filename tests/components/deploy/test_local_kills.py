"""A promote on this machine, killed at every boundary, then finished or undone, under a stream of
requests: none is lost, and nothing is left beside the one version that is served."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import find_served
from nudge.components.common.local import processes
from nudge.components.deploy.local import gateway
from nudge.components.deploy.local.local_serving import LocalServing
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.local import services
from tests.components.deploy.local_promote import BOUNDARIES, promote, quick_server
from tests.components.deploy.stream import Stream
from tests.local_registry import endpoint_token

NAME = "killed"


def killed(version: str, at: int) -> None:
    command = [sys.executable, "-m", "tests.components.deploy.local_promote", NAME, version]
    ended = subprocess.run(
        [*command, str(at)], cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL, timeout=200
    )
    assert ended.returncode == -signal.SIGKILL, "it ended before the boundary"


@pytest.mark.long
def test_killed_at_every_boundary_and_run_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_registry import ModelRegistry

    for key, value in services.up(home).items():
        monkeypatch.setenv(key, value)
    url = os.environ["NUDGE_REGISTRY_URL"]
    client = ModelRegistry(url, author="test", is_secure=False)
    for version in ("v1", "v2"):
        model = tmp_path / version
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(version.encode())
        uri = upload(UploadSettings(model_name=NAME), model=model, version=version)["uri"]
        client.register_model(
            NAME, uri, version=version, model_format_name="vLLM", model_format_version="1"
        )
    monkeypatch.setattr(LocalServing, "_serve", quick_server)
    promote(NAME, "v1")
    served = with_registry(url, find_served(NAME))
    assert served is not None
    stream = Stream(served.endpoint, NAME, endpoint_token(home), clients=2)
    try:
        now, other = "v1", "v2"
        for at in range(1, BOUNDARIES + 1):
            killed(other, at)
            assert gateway.routes(home)[NAME].shares in ({now: 100}, {other: 100})
            if (at // 2) % 2 == 0:  # finished, else undone
                now, other = other, now
            promote(NAME, now)
            check(home, url, now)
    finally:
        stream.stop()
    assert stream.faults == []
    assert stream.answered > BOUNDARIES


def check(home: Path, url: str, version: str) -> None:
    """One version is served, the registry says so, and no server runs besides."""
    assert gateway.routes(home)[NAME].shares == {version: 100}
    served = with_registry(url, find_served(NAME))
    assert served is not None
    assert served.shares == {version: 100}
    here = [each for each in processes.records(home) if NAME in each.name]
    assert {each.name for each in here} == {f"gateway-{NAME}", f"serving-{NAME}@{version}"}
    (serving,) = (each.pid for each in here if each.name.startswith("serving-"))
    parent = str(Path(__file__).with_name("quick_server.py"))
    running = [
        each.pid
        for each in psutil.process_iter(["cmdline"])
        if parent in (each.info["cmdline"] or ())
    ]
    assert running == [serving]
