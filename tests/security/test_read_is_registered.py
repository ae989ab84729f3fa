"""Attacks on the models that a run starts from or is compared with: the served version's files."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import Served, Version, note_served
from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import local_model, local_tokenizer, resolved
from nudge.components.common.models.registered import PIN, pinned_uri, split_pin
from nudge.components.evaluate.incumbent import bring, find_incumbent
from nudge.components.fetch.fetch import fetch
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.local import services
from tests.security.uploads import (
    NAME,
    Tamper,
    below,
    change_the_tokenizer,
    flip_a_weight,
    tampered,
)

SERVED = f"incumbent://{NAME}"


@pytest.fixture
def served(
    released: Version, store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Version:
    """The version, which the registry calls served."""
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "cache"))
    note(store, released)
    return released


def note(store: dict[str, str], version: Version) -> None:
    url = store["NUDGE_REGISTRY_URL"]
    now = Served(NAME, url, {version.name: 100}, (version.name,))
    with_registry(url, note_served(version, now, "test", "vllm"))


def test_what_was_registered_is_read(served: Version, tmp_path: Path) -> None:
    uri = resolved(SERVED)
    assert uri == f"{served.uri}{PIN}{served.properties['manifest_sha256']}"
    assert split_pin(uri) == (served.uri, served.properties["manifest_sha256"])
    assert (local_model(uri) / "model.safetensors").is_file()
    assert (local_tokenizer(uri) / "tokenizer.json").is_file()
    assert fetch(SERVED, model=tmp_path / "m", history=tmp_path / "h") == {"uri": served.uri}


@pytest.mark.parametrize("attack", [flip_a_weight, change_the_tokenizer])
def test_a_writer_of_the_bucket_changes_nothing_that_a_run_starts_from(
    served: Version, attack: Tamper, tmp_path: Path
) -> None:
    """With a manifest that fits the changed files, before and after the URI was pinned."""
    uri = resolved(SERVED)
    tampered(served.uri, attack, hide=True)
    with pytest.raises(UserError, match="is not the one that was registered"):
        resolved(SERVED)
    with pytest.raises(UserError, match="is not the one that was registered"):
        local_model(uri)
    with pytest.raises(UserError, match="is not the one that was registered"):
        local_tokenizer(uri)
    with pytest.raises(UserError, match="is not the one that was registered"):
        fetch(SERVED, model=tmp_path / "m", history=tmp_path / "h")
    assert not (tmp_path / "m").exists()


def test_a_changed_tokenizer_is_refused_where_only_the_tokenizer_is_read(served: Version) -> None:
    tampered(served.uri, change_the_tokenizer, hide=False)
    for uri in (served.uri, resolved(SERVED)):
        with pytest.raises(UserError, match=r"tokenizer\.json has the sha256"):
            local_tokenizer(uri)


def test_a_candidate_is_compared_with_what_was_registered(
    served: Version, store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who makes the served version worse would let a worse candidate pass."""
    monkeypatch.setattr("nudge.components.evaluate.incumbent._silent", lambda endpoint: "")
    found = find_incumbent(NAME, store["NUDGE_REGISTRY_URL"])
    assert found.manifest_sha256 == served.properties["manifest_sha256"]
    assert bring(found, NAME)[0].state == "found"
    tampered(served.uri, change_the_tokenizer, hide=True)
    seen, folder = bring(found, NAME)
    assert (seen.state, folder) == ("unknown", None)
    assert "is not the one that was registered" in seen.why


def test_a_writer_of_the_registry_names_no_other_upload_to_read(
    served: Version, store: dict[str, str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """URI and digest are changed together, to an upload of another model."""

    uri = upload(UploadSettings(model_name="other"), model=model, version=served.name)["uri"]
    key = f"{below(uri)}/manifest.json"
    manifest = s3_client().get_object(Bucket=services.BUCKET, Key=key)["Body"].read()
    digest = hashlib.sha256(manifest).hexdigest()
    properties = {**served.properties, "manifest_sha256": digest}
    moved = dataclasses.replace(served, uri=uri, properties=properties)
    with pytest.raises(UserError, match=f"is of model 'other', not of '{NAME}'"):
        pinned_uri(moved)
    for elsewhere in ("hf://owner/name", "/tmp/model"):
        with pytest.raises(UserError, match="nothing there can be compared"):
            pinned_uri(dataclasses.replace(served, uri=elsewhere))
