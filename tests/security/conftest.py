"""The embedded store and registry, with a version that a run uploaded and registered."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nudge.components.common.artifacts.model_files import files_sha256, model_files
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.publish import sha256_file, write_manifest
from nudge.components.common.models.base_model import model_sha256
from nudge.components.register.register import register
from nudge.components.register.settings import RegisterSettings
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.local import services
from tests.security.uploads import NAME, looked_up
from tests.tiny import make_trained_model


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that every user of the machine can reach."""
    folder = Path(tempfile.mkdtemp(prefix="nudge-open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("home")
    yield services.up(home)
    services.down(home)


@pytest.fixture
def store(parts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for key, value in parts.items():
        monkeypatch.setenv(key, value)
    return parts


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return make_trained_model(tiny_model, tmp_path / "model", epochs=1)


@pytest.fixture
def evaluation(model: Path, tmp_path: Path) -> Path:
    """What `evaluate` writes of this very folder, as far as it is registered."""
    every = {name: sha256_file(path) for name, path in model_files(model).items()}
    difference = {"difference_bits_per_byte": -0.1}
    candidate = {"sha256": model_sha256(model), "files_sha256": files_sha256(every)}
    body = {
        "verdict": {"reason": "better", "promote": True, "comparisons": {"base": difference}},
        "metrics": {"candidate": {"bits_per_byte": 0.9}},
        "models": {"candidate": candidate},
        "probes": [],
    }
    write_manifest(tmp_path / "evaluation.json", "nudge.evaluation", 1, body)
    return tmp_path / "evaluation.json"


@pytest.fixture
def released(
    store: dict[str, str], model: Path, evaluation: Path, request: pytest.FixtureRequest
) -> Version:
    """A version of the test's own, as the pipeline uploads and registers one."""
    version = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    uri = upload(UploadSettings(model_name=NAME), model=model, version=version)["uri"]
    register(
        RegisterSettings(model_name=NAME),
        uri=uri, version=version, run_id=version, model=model, evaluation=evaluation,
    )  # fmt: skip
    return looked_up(store, version)
