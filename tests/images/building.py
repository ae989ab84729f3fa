"""What the tests of the images build and run them with."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
BASE = "localhost/nudge-test-base-python:bookworm"
CANARY = "AKIA" + "C4N4RYC4N4RY" + "C4N4"  # never whole in a file that an image may hold
CA = Path("/etc/ssl/certs/ca-certificates.crt")
TORCH = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"


def tool() -> Any:
    """The module images/build.py, which is outside the package."""
    spec = importlib.util.spec_from_file_location("build", IMAGES / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, **options)


def make_base(program: str, folder: Path) -> None:
    if os.getuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("a base image needs debootstrap, and root to run it")
    include = "--include=python3,python3-venv,ca-certificates"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", include, "bookworm", str(folder / "root")],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"debootstrap cannot make a base: {made.stdout[-300:]}")
    for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(folder / "root" / waste)
    call("tar", "-C", str(folder / "root"), "-cf", str(folder / "base.tar"), ".")
    call(program, "import", str(folder / "base.tar"), BASE)


def run(docker: str, image: str, *command: str) -> subprocess.CompletedProcess[str]:
    """As OpenShift runs it: an id that nobody has, group 0, an unwritable root; and no network."""
    options = ["--rm", "--network=none", "--read-only", "--tmpfs=/tmp", "--user=1000760000:0"]
    options += ["--cap-drop=ALL", "--security-opt=no-new-privileges"]
    return subprocess.run(
        [docker, "run", *options, image, *command], capture_output=True, text=True
    )
