"""The images, built once for all tests of this folder, on a Debian base made here."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from tests.images.building import BASE, CA, CANARY, ROOT, TORCH, call, make_base, tool


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Docker's client with its daemon running and a base image; skips where neither can be had."""
    try:
        program = str(tool().engine("docker"))
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
def checkout(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout with all wheels that the images install, and with secrets lying about
    where a careless build takes them in."""
    torch = Path(os.environ.get("PIP_FIND_LINKS", "/nowhere")) / TORCH
    if not torch.is_file():
        pytest.skip(f"the CPU build of PyTorch is in no wheel folder here ({torch})")
    folder = tmp_path_factory.mktemp("checkout") / "nudge"
    made = (".git", ".nudge", ".venv", ".*_cache", "__pycache__", "build", "dist", "*.whl")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made))
    (folder / ".venv").symlink_to(Path(sys.prefix))
    version = call(docker, "run", "--rm", BASE, "python3", "--version").stdout.split()[1]
    call("make", "wheels", f"PYTHON_VERSION={version}", "TORCH=cpu", cwd=folder)
    for path in (".env", "components/.env", "pipelines/prod.env"):
        (folder / path).write_text(f"AWS_ACCESS_KEY_ID={CANARY}\n")
    return folder


@pytest.fixture(scope="session")
def built(docker: str, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every image by name: the smallest from the package index, the others without a network."""
    build = tool()
    build.ROOT = checkout
    conf = tmp_path_factory.mktemp("secrets") / "pip.conf"
    conf.write_text(f"[global]\ncert = /run/secrets/ca.pem\ntimeout = 180\n# {CANARY}\n")
    build.ENVIRONMENT.update(AWS_ACCESS_KEY_ID=CANARY, AWS_SECRET_ACCESS_KEY=CANARY * 2)
    common = {"base_image": BASE, "torch": "cpu", "pip_conf": str(conf), "ca": str(CA)}
    for name in build.IMAGES:
        online = {"network": "host"} if name == "data" else {"offline": "yes"}
        build.build(docker, name, **common, **online)
    return dict(build.IMAGES)
