"""No child process runs code from the folder that a command is started in."""

import sys
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.pipelines.local import services, serving

MODULES = ("click", "uvicorn", "json", "nudge", "torch", "transformers", "kfp", "yaml", "fastapi")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder whose modules write a file when they are imported; the file's path."""
    folder, canary = tmp_path / "planted", tmp_path / "ran"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(folder)
    return canary


def test_no_server_runs_code_of_the_current_folder(tmp_path: Path, planted: Path) -> None:
    home = tmp_path / "home"
    try:
        environment = services.up(home)
        serving.open_to_containers(home, environment)
    finally:
        services.down(home)
    assert not planted.exists()


def test_no_run_takes_code_from_the_current_folder(tmp_path: Path, planted: Path) -> None:
    """The runner, and below it kfp's own child that executes a step."""
    from nudge.pipelines.local import following
    from nudge.pipelines.local import run as local_run
    from nudge.pipelines.recipes import load

    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel_name: r\nbase_model: /no/base\ningest: {data_uri: /nowhere/at/all}\n"
    )
    run = local_run.begin(load(str(tmp_path / "r.yaml")), tmp_path / "home", fresh=True)
    for _ in following.follow(run, tmp_path / "home", {}, reuse=False):
        pass
    assert run.failed is not None, run.log.read_text()
    assert "/nowhere/at/all" in str(run.failed.error)  # the step itself ran
    assert not planted.exists()


def test_no_rank_takes_code_from_the_current_folder(tmp_path: Path, planted: Path) -> None:
    from nudge.components.train.settings import TrainSettings
    from nudge.components.train.torchrun import run_ranks

    settings = TrainSettings(base_model=str(tmp_path / "none"))
    names = ("tokens", "model", "history", "report")
    with pytest.raises(UserError):
        run_ranks(2, settings, {name: tmp_path / name for name in names})
    assert not planted.exists()


def test_every_child_that_runs_a_module_is_started_with_a_safe_path() -> None:
    """Also where no test starts it: the image of a cluster's steps, and the worker of a job."""
    from nudge.components.train.cluster import worker

    assert "-P" in worker.command(Path("/x"))
    images = (Path(__file__).parents[2] / "images" / "Containerfile").read_text()
    assert "PYTHONSAFEPATH=1" in images
    assert sys.version_info >= (3, 11)  # which knows -P
