"""Fixtures of the tests that run the whole step."""

import shutil
from pathlib import Path

import pytest

from nudge.components.common.artifacts.evaluation import Incumbent
from nudge.components.common.artifacts.model_files import model_files
from nudge.components.common.clients import bucket
from nudge.components.common.core.publish import sha256_file, write_manifest
from nudge.components.evaluate import incumbent
from tests.components.evaluate.workspace import Say, Workspace, make_workspace


@pytest.fixture(scope="module")
def workspace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("evaluate"), tiny_model)


@pytest.fixture
def served_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """Sets the incumbent that the registry reports, and the folder that was uploaded for it;
    initially none."""
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))

    def say(found: Incumbent, folder: Path | None = None) -> None:
        def download(uri: str, into: Path, *_: object) -> None:
            assert folder is not None
            shutil.copytree(folder, into, dirs_exist_ok=True)
            files = {
                name: {"sha256": sha256_file(file)} for name, file in model_files(into).items()
            }
            write_manifest(into / "manifest.json", "nudge.upload", 1, {"files": files})

        monkeypatch.setattr(incumbent, "find_incumbent", lambda *_: found)
        monkeypatch.setattr(bucket, "download_folder", download)

    say(Incumbent("none"))
    return say
