"""SIGKILL at every request that changes the store or the registry, followed by a rerun."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nudge.components.common.clients.bucket import download_folder
from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import find_version
from nudge.components.common.models.base_model import model_sha256
from nudge.pipelines.local import services
from tests.components.register.test_register import objects, versions
from tests.components.upload.test_sending import check_folder
from tests.faulty_proxy import FaultyProxy

PROGRAM = Path(__file__).with_name("releasing.py")


class Killer:
    """Two proxies that SIGKILL a process at its ``at``-th changing request; 0 means never."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.at, self.seen, self.killed = 0, 0, False
        self.child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._environment = environment
        self._keys = ("AWS_S3_ENDPOINT", "NUDGE_REGISTRY_URL")
        self.proxies = [
            FaultyProxy(environment[key], share=0.0, only=self._count) for key in self._keys
        ]

    def run(self, at: int, *arguments: object) -> int:
        """Run the program; returns its exit status."""
        self.at, self.seen, self.killed = at, 0, False
        addresses = zip(self._keys, self.proxies, strict=True)
        environment = {
            **os.environ,
            **self._environment,
            **{key: proxy.url for key, proxy in addresses},
        }
        command = [sys.executable, str(PROGRAM), *map(str, arguments)]
        with self._lock:
            self.child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        return self.child.wait(timeout=240)

    def _count(self, method: str, path: str) -> bool:
        if method in ("GET", "HEAD"):
            return False
        with self._lock:
            self.seen += 1
            if self.seen == self.at and self.child:
                self.child.send_signal(signal.SIGKILL)
                self.killed = True
        return False


def killed_and_repeated(
    environment: dict[str, str], model: Path, evaluation: Path, tmp_path: Path, only: set[int]
) -> int:
    """Kill at each changing request of ``only`` (empty: of all); returns the number of kills."""
    (model / "more.safetensors").write_bytes(os.urandom(12 << 20))
    results = json.loads(evaluation.read_text())
    results["models"]["candidate"]["sha256"] = model_sha256(model)
    evaluation.write_text(json.dumps(results))
    killer = Killer(environment)
    for proxy in killer.proxies:
        proxy.start()
    kills = 0
    try:
        assert killer.run(0, model, evaluation, "killed", "v0") == 0
        total = killer.seen
        for at in range(1, total + 1):
            if only and at not in {number % (total + 1) for number in only}:
                continue
            name, version = f"killed-{at}", f"v{at}"
            assert killer.run(at, model, evaluation, name, version) == -signal.SIGKILL
            assert killer.killed
            kills += 1
            assert killer.run(0, model, evaluation, name, version) == 0
            assert versions(environment, name) == {version: False}
            assert objects(name) == {version}
            url = environment["NUDGE_REGISTRY_URL"]
            uri = f"s3://{services.BUCKET}/models/{name}/{version}"
            assert with_registry(url, find_version(name, version)).uri == uri
            download_folder(uri, tmp_path / version)
            check_folder(model, tmp_path / version)
    finally:
        for proxy in killer.proxies:
            proxy.stop()
    return kills


def test_a_kill_between_upload_and_register(
    environment: dict[str, str], model: Path, evaluation: Path, tmp_path: Path
) -> None:
    # From the end: deletion of the pending registration, artifact, version, model.
    assert killed_and_repeated(environment, model, evaluation, tmp_path, {-4}) == 1


@pytest.mark.long
def test_a_kill_at_every_request(
    environment: dict[str, str], model: Path, evaluation: Path, tmp_path: Path
) -> None:
    assert killed_and_repeated(environment, model, evaluation, tmp_path, set()) >= 10
