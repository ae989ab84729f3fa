"""An incomplete or unsafe model folder is rejected before anything is sent."""

import json
import shutil
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.upload.upload import _files


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_complete_model_is_accepted(folder: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= _files(folder).keys()


def test_a_pickle_is_rejected(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickle"):
        _files(folder)


def test_a_link_out_of_the_folder_is_rejected(folder: Path) -> None:
    (folder / "passwd.txt").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link out of"):
        _files(folder)


def test_a_missing_shard_is_rejected(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        _files(folder)


def test_a_folder_without_weights_is_rejected(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        _files(folder)
