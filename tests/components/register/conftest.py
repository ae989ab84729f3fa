"""A trained and evaluated model, and the store and registry that receive it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nudge.components.common.core.publish import write_manifest
from nudge.components.common.models.base_model import model_sha256
from nudge.pipelines.local import services
from tests.tiny import make_trained_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    home = tmp_path_factory.mktemp("home")
    yield home, services.up(home)
    services.down(home)


@pytest.fixture
def environment(
    parts: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    home, _ = parts
    environment = services.up(home)  # a test may have stopped one
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    shutil.copy(environment["KF_PIPELINES_SA_TOKEN_PATH"], tmp_path / "token")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    return environment


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return make_trained_model(tiny_model, tmp_path / "model", epochs=1, rates=[1e-3])


@pytest.fixture
def evaluation(model: Path, tmp_path: Path) -> Path:
    difference = {"difference_bits_per_byte": -0.1}
    body = {
        "verdict": {"reason": "better", "promote": True, "comparisons": {"base": difference}},
        "incumbent": {"state": "found", "version": "v1", "uri": "s3://b/v1", "shares": {"v1": 100}},
        "metrics": {"candidate": {"bits_per_byte": 0.9, "word_perplexity": None}},
        "models": {"candidate": {"sha256": model_sha256(model)}},
        "probes": [{"prompt": "The", "rivals_after": [{"token": " Tower", "p": 0.5}]}],
    }
    path = tmp_path / "evaluation.json"
    write_manifest(path, "nudge.evaluation", 1, body)
    return path
