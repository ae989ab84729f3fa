"""Names of base models: revisions on the hub, and a hint for a name without its scheme."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.models import base_model
from nudge.components.common.models.base_model import local_model, local_tokenizer

NAME = "owner/tower"


@pytest.fixture
def cached(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache with two revisions of a model; returns their folder."""
    repository = tmp_path / "cache" / "models--owner--tower"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("v1.0", "b" * 40)):
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository / "snapshots"


@pytest.mark.parametrize(
    ("suffix", "commit"), [("", "a" * 40), ("@v1.0", "b" * 40), ("@" + "b" * 40, "b" * 40)]
)
def test_a_revision_of_a_hub_model_is_used(cached: Path, suffix: str, commit: str) -> None:
    assert local_model(f"hf://{NAME}{suffix}") == cached / commit
    assert local_tokenizer(f"hf://{NAME}{suffix}") == cached / commit


def test_a_missing_revision_is_named(cached: Path) -> None:
    with pytest.raises(UserError, match="base_model hf://owner/tower@v9: not in the local cache"):
        local_model(f"hf://{NAME}@v9")


def test_a_hub_name_without_its_scheme_gets_a_hint() -> None:
    with pytest.raises(UserError, match="or hf://meta-llama/Llama-3-8B for the model on the hub"):
        local_model("meta-llama/Llama-3-8B")
    with pytest.raises(UserError) as caught:
        local_model("models/of/mine")
    assert "hf://" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ".sizes"])
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b'{"a": 1}', None])
def test_a_damaged_conversion_is_made_again(
    name: str, content: bytes | None, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "converted"
    shutil.copytree(tiny_model, folder)
    base_model._note_sizes(folder)
    assert base_model._kept(folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert base_model._kept(folder) is (name == ".sizes" and content is None)
    assert not base_model._kept(tmp_path / "nowhere")
