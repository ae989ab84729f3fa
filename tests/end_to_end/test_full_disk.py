"""A disk that fills while a model is trained, and a store that fills while it is uploaded."""

from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.tokenize.tokenize import tokenize
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.recipes import load
from tests.conftest import Disk

RECIPE = str(Path(__file__).parent / "tiny.yaml")


def test_training_on_a_full_disk_leaves_no_model(
    disk: Disk, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = load(RECIPE, [f"base_model={tiny_model}"]).text
    settings = step_settings(TrainSettings, "train", recipe)
    corpus, tokens = tmp_path / "corpus", tmp_path / "tokens"
    report = tmp_path / "report.html"
    ingest(step_settings(IngestSettings, "ingest", recipe), corpus=corpus, report=report)
    tokenize(step_settings(TokenizeSettings, "tokenize", recipe), corpus=corpus, tokens=tokens)
    small = disk.resize(100)
    with pytest.raises(UserError, match="train: no space is left on the disk of .*/disk;"):
        paths = {name: small / name for name in ("model", "history", "report")}
        train(settings, tokens=tokens, **paths)
    assert list(small.iterdir()) == []


@pytest.mark.long
def test_uploading_to_a_full_store_shows_no_version(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nudge.components.common.clients.storage import s3_client
    from nudge.pipelines.local import services
    from tests.objects import list_keys

    home = disk.resize(60 << 10)
    monkeypatch.setenv("NUDGE_HOME", str(home))
    try:
        for name, value in services.up(home).items():
            monkeypatch.setenv(name, value)
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(bytes(range(256)) * (90 << 12))
        settings = UploadSettings(model_name="m")
        failed = "upload to s3://nudge/models/m/v1: InternalError from http"
        with pytest.raises(UserError, match=failed):
            upload(settings, model=model, version="v1")
        assert "models/m/v1/manifest.json" not in list_keys(s3_client(), "nudge", "models/m")
        disk.resize(400 << 10)
        upload(settings, model=model, version="v1")
        assert "models/m/v1/manifest.json" in list_keys(s3_client(), "nudge", "models/m")
    finally:
        services.down(home)
