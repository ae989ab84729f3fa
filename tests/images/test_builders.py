"""The other programs that build images, podman and buildah: without a network, on the same base."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.building import BASE, call, run, tool


@pytest.fixture(params=["podman", "buildah"])
def builder(
    request: pytest.FixtureRequest, docker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The program, with a storage of its own that holds the base alone."""
    program = shutil.which(request.param)
    if program is None or os.getuid() != 0:
        pytest.skip(f"no {request.param} is here, or nobody may run it")
    storage = tmp_path / "storage.conf"
    places = f'runroot = "{tmp_path / "run"}"\ngraphroot = "{tmp_path / "graph"}"'
    storage.write_text(f'[storage]\ndriver = "overlay"\n{places}\n')
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(storage))
    # Those that they would set are above what a sandbox may.
    limits = tmp_path / "containers.conf"
    limits.write_text('[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n')
    monkeypatch.setenv("CONTAINERS_CONF", str(limits))
    call(docker, "save", "--output", str(tmp_path / "base.tar"), BASE)
    call(program, "pull", f"docker-archive:{tmp_path / 'base.tar'}")
    yield program
    if request.param == "buildah":
        call(program, "rm", "--all")
    call(program, "rmi", "--all", "--force")
    subprocess.run(["umount", str(tmp_path / "graph" / "overlay")], capture_output=True)


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_it_builds_the_data_image(builder: str, checkout: Path) -> None:
    build = tool()
    build.ROOT = checkout
    build.build(builder, "data", base_image=BASE, offline="yes")
    image = build.IMAGES["data"]
    size = build.size_mb(builder, image)
    print(Path(builder).name, size)
    assert 400 < size < 650  # each program counts in its own way
    if Path(builder).name == "podman":
        shown = run(builder, image, "nudge", "recipes")
    else:
        container = call(builder, "from", image).stdout.strip()
        inside = [builder, "run", "--user=1000760000:0", container, "nudge", "recipes"]
        shown = subprocess.run(inside, capture_output=True, text=True)
    assert "eiffel" in shown.stdout, shown.stderr
