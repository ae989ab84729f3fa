"""The images, built once for all tests of this folder, on a Debian base made here."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nudge.components.common.errors import UserError

from tests.images.building import (
    BASE,
    CA,
    CANARY,
    IMAGES,
    ROOT,
    TORCH,
    make_base,
    tool,
)


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Docker's client with its daemon running and a base image; skips where neither can be had."""
    try:
        program = str(tool().engine())
    except UserError as error:
        pytest.skip(str(error))
    daemon = None
    if subprocess.run([program, "info"], capture_output=True).returncode:
        if os.getuid() != 0 or shutil.which("dockerd") is None:
            pytest.skip("no container daemon answers, and none can be started here")
        log = (tmp_path_factory.mktemp("dockerd") / "log").open("w")
        daemon = subprocess.Popen(["dockerd"], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while subprocess.run([program, "info"], capture_output=True).returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"dockerd does not come up here; its log is {log.name}")
            time.sleep(0.5)
    try:
        if subprocess.run([program, "inspect", BASE], capture_output=True).returncode:
            make_base(program, tmp_path_factory.mktemp("base"))
        yield program
    finally:
        if daemon is not None:
            daemon.terminate()
            daemon.wait()


@pytest.fixture(scope="session")
def built(docker: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both images by name, built with secrets lying about where a careless build takes them in."""
    build = tool()
    folder = tmp_path_factory.mktemp("secrets")
    conf = folder / "pip.conf"
    conf.write_text(f"[global]\ncert = /run/secrets/ca.pem\ntimeout = 180\n# {CANARY}\n")
    wheels = [Path(os.environ.get("PIP_FIND_LINKS", "/nowhere")) / TORCH, IMAGES / "wheels" / TORCH]
    wheel = next((path for path in wheels if path.is_file()), None)
    if wheel is None:
        pytest.skip(f"the CPU build of PyTorch is in no wheel folder here ({TORCH})")
    if not (IMAGES / "wheels" / TORCH).is_file():
        shutil.copy(wheel, IMAGES / "wheels" / TORCH)
    planted = [ROOT / ".env", ROOT / "components" / ".env", ROOT / "pipelines" / "prod.env"]
    build.ENVIRONMENT.update(AWS_ACCESS_KEY_ID=CANARY, AWS_SECRET_ACCESS_KEY=CANARY * 2)
    try:
        for path in planted:
            path.write_text(f"AWS_ACCESS_KEY_ID={CANARY}\n")
        for name in build.IMAGES:
            options = {"base_image": BASE, "torch": "cpu", "network": "host", "pip_conf": str(conf)}
            build.build(docker, name, **options, ca=str(CA))
    finally:
        for path in planted:
            path.unlink(missing_ok=True)
    return dict(build.IMAGES)
