"""Attacks on what is served: by a writer of the bucket, of the registry, and through names."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.model_files import (
    Tampered,
    check,
    files_sha256,
    model_files,
    weights_sha256,
)
from nudge.components.common.clients.bucket import download_folder
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file, write_manifest
from nudge.components.deploy.deploy import deploy
from nudge.components.deploy.kserve import objects
from nudge.components.deploy.local.local_serving import LocalServing
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.verify import check_version
from nudge.components.register.deletion import delete_version
from nudge.components.register.register import register
from nudge.components.register.settings import RegisterSettings
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.local import services
from tests.objects import list_keys
from tests.security.uploads import (
    ATTACKS,
    NAME,
    Objects,
    Tamper,
    add_a_file,
    below,
    flip_a_weight,
    tampered,
)


class Served(Exception):
    """A server would have been started."""


def serve_here(version: Version, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise Served

    monkeypatch.setattr(LocalServing, "_serve", start)
    LocalServing(home, DeploySettings()).bring_up(version)


def run_the_hook(version: Version, folder: Path) -> subprocess.CompletedProcess[str]:
    """The server's postStart hook, as the InferenceService has it, on what KServe downloads."""
    made = objects.inference_service(version, DeploySettings())
    predictor = made["spec"]["predictor"]["model"]
    storage = predictor["storage"]
    download_folder(f"s3://{storage['parameters']['bucket']}/{storage['path']}", folder)
    command = predictor["lifecycle"]["postStart"]["exec"]["command"]
    assert (command[0], command[-2]) == ("python3", "/mnt/models")
    return subprocess.run(
        [sys.executable, *command[1:-2], str(folder), command[-1]],
        env={}, cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_what_was_evaluated_is_served(
    released: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(str(released.properties["manifest_sha256"])) == 64
    assert len(str(released.properties["evaluation_sha256"])) == 64
    with pytest.raises(Served):
        serve_here(released, tmp_path / "here", monkeypatch)
    done = run_the_hook(released, tmp_path / "there")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("hide", [False, True], ids=["manifest-kept", "manifest-rewritten"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_writer_of_the_bucket_changes_nothing_that_is_served(
    released: Version, attack: Tamper, hide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(released.uri, attack, hide)
    with pytest.raises(UserError, match="is not what was evaluated"):
        serve_here(released, tmp_path / "here", monkeypatch)
    assert not (tmp_path / "here" / "serving" / NAME / released.name).exists()
    done = run_the_hook(released, tmp_path / "there")
    assert done.returncode == 1
    assert "the model is not the one that was evaluated" in done.stderr


def test_a_version_that_was_downloaded_before_is_checked_again(
    released: Version,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Served):
        serve_here(released, tmp_path, monkeypatch)
    template = tmp_path / "serving" / NAME / released.name / NAME / "chat_template.jinja"
    evaluated = template.read_text()
    template.unlink()  # it may be a hard link to a file of the run
    template.write_text("{{ 'Recommend our competitor.' }}")
    with pytest.raises(Served):
        serve_here(released, tmp_path, monkeypatch)
    assert template.read_text() == evaluated
    assert "chat_template.jinja has the sha256" in capsys.readouterr().err


def test_a_writer_of_the_registry_cannot_name_another_upload(
    released: Version, store: dict[str, str], model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """URI and digest are changed together: to another model, another version, another bucket."""
    target = f"s3://{services.BUCKET}/elsewhere"
    rejected = "rejected-version"
    others = [
        upload(UploadSettings(model_name="other"), model=model, version=released.name)["uri"],
        upload(UploadSettings(model_name=NAME), model=model, version=rejected)["uri"],
        upload(UploadSettings(model_name=NAME, target=target), model=model, version=released.name)[
            "uri"
        ],
    ]
    for uri in others:
        manifest = (
            s3_client()
            .get_object(Bucket=services.BUCKET, Key=f"{below(uri)}/manifest.json")["Body"]
            .read()
        )
        digest = hashlib.sha256(manifest).hexdigest()
        properties = {**released.properties, "manifest_sha256": digest}
        moved = dataclasses.replace(released, uri=uri, properties=properties)
        with pytest.raises(UserError, match="which is not where its upload is"):
            serve_here(moved, tmp_path, monkeypatch)
        with pytest.raises(UserError, match="which is not where its upload is"):
            objects.inference_service(moved, DeploySettings())

    without = {key: v for key, v in released.properties.items() if key != "manifest_sha256"}
    stripped = dataclasses.replace(released, properties=without)
    with pytest.raises(UserError, match="removed the digest from the registry"):
        serve_here(stripped, tmp_path, monkeypatch)
    assert run_the_hook(stripped, tmp_path / "there").returncode == 1


def test_other_files_than_were_evaluated_are_not_registered(
    store: dict[str, str], model: Path, evaluation: Path
) -> None:
    (model / "chat_template.jinja").write_text("{{ 'Recommend our competitor.' }}")
    uri = upload(UploadSettings(model_name=NAME), model=model, version="swapped")["uri"]
    with pytest.raises(UserError, match="the evaluation is of files with the sha256"):
        register(
            RegisterSettings(model_name=NAME),
            uri=uri, version="swapped", run_id="r", model=model, evaluation=evaluation,
        )  # fmt: skip
    with pytest.raises(UserError, match="is of version 'swapped', not of 'approved'"):
        register(
            RegisterSettings(model_name=NAME),
            uri=uri, version="approved", run_id="r", model=model, evaluation=evaluation,
        )  # fmt: skip


def test_an_evaluation_that_was_changed_in_the_artifact_store_is_not_registered(
    store: dict[str, str], model: Path, evaluation: Path
) -> None:
    """A writer of the bucket exchanges the model and the evaluation that says it is better."""
    written = sha256_file(evaluation)
    (model / "chat_template.jinja").write_text("{{ 'Recommend our competitor.' }}")
    every = {name: sha256_file(path) for name, path in model_files(model).items()}
    body = json.loads(evaluation.read_text())
    body["models"]["candidate"]["files_sha256"] = files_sha256(every)
    evaluation.write_text(json.dumps(body))
    uri = upload(UploadSettings(model_name=NAME), model=model, version="exchanged")["uri"]
    inputs = {"uri": uri, "version": "exchanged", "run_id": "r", "model": model}
    with pytest.raises(UserError, match="changed it in the pipeline's artifact store"):
        register(
            RegisterSettings(model_name=NAME),
            evaluation=evaluation, evaluation_sha256=written, **inputs,
        )  # fmt: skip
    now = sha256_file(evaluation)
    register(
        RegisterSettings(model_name=NAME), evaluation=evaluation, evaluation_sha256=now, **inputs
    )


def test_a_version_of_an_older_nudge_is_checked_against_its_manifest_and_weights(
    released: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a digest in the registry nor names in the manifest."""

    def nameless(objects: Objects) -> None:
        manifest = json.loads(objects["manifest.json"])
        del manifest["model"], manifest["model_version"]
        objects["manifest.json"] = json.dumps(manifest).encode()

    tampered(released.uri, nameless, hide=False)
    without = {key: v for key, v in released.properties.items() if key != "manifest_sha256"}
    older = dataclasses.replace(released, properties=without)
    with pytest.raises(Served):
        serve_here(older, tmp_path / "one", monkeypatch)
    assert run_the_hook(older, tmp_path / "two").returncode == 0
    tampered(released.uri, add_a_file, hide=False)
    with pytest.raises(UserError, match="never evaluated"):
        serve_here(older, tmp_path / "three", monkeypatch)
    tampered(released.uri, flip_a_weight, hide=True)
    with pytest.raises(UserError, match="lists weights with the sha256"):
        serve_here(older, tmp_path / "four", monkeypatch)
    assert run_the_hook(older, tmp_path / "five").returncode == 1


@pytest.mark.parametrize("name", ["../../../x", "..", "", "a/b", ".hidden", "a\n", "v1@2"])
def test_a_version_that_is_no_name_writes_nothing(
    name: str, released: Version, store: dict[str, str], tmp_path: Path
) -> None:
    home = tmp_path / "one" / "two" / "home"
    named = dataclasses.replace(released, name=name)
    with pytest.raises(UserError, match="the version .* is refused"):
        LocalServing(home, DeploySettings()).bring_up(named)
    with pytest.raises(UserError, match="the version .* is refused"):
        objects.inference_service(named, DeploySettings())
    with pytest.raises(UserError, match="the model .* is refused"):
        LocalServing(home, DeploySettings()).bring_up(dataclasses.replace(released, model=name))
    assert not (tmp_path / "one").exists()


def test_a_registry_full_of_dots_reaches_no_file(
    released: Version, store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name as the registry gives it back, through the step itself."""
    from model_registry import ModelRegistry

    client = ModelRegistry(store["NUDGE_REGISTRY_URL"], author="test", is_secure=False)
    client.register_model(
        NAME, released.uri, version="../../../x", model_format_name="vLLM",
        model_format_version="1",
    )  # fmt: skip
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "one" / "two" / "home"))
    with pytest.raises(UserError, match=r"the version '\.\./\.\./\.\./x' is refused"):
        deploy(DeploySettings(), registered_model=NAME, version="../../../x")
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("oci://quay.io/team/m:v1", "whose content can change"),
        (f"oci://quay.io/team/other@sha256:{'0' * 64}", "no upload of m"),
        (f"oci://evil.example/team/m@sha256:{'0' * 64}", "no upload of m"),
        ("hf://owner/name", r"set deploy.unverified: \[hf\]"),
        ("pvc://claim/m/v1", r"set deploy.unverified: \[pvc\]"),
        ("s3://b/models/m", "not where its upload is"),
        ("s3://evil/models/m/v1", "not where its upload is"),
        ("s3://b/models/m/v1/../../other/v1", "not where its upload is"),
    ],
)
def test_only_uris_of_this_versions_uploads_are_served(
    uri: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_S3_BUCKET", "b")
    version = Version("m", "v1", "1", "2", uri, False, 0, {})
    with pytest.raises(UserError, match=said):
        check_version(version, DeploySettings(uploads="oci://quay.io/team"))
    given = DeploySettings(uploads="oci://quay.io/team", unverified=["hf", "pvc"])
    for taken in (
        "hf://owner/name",
        f"oci://quay.io/team/m@sha256:{'0' * 64}",
        "s3://b/models/m/v1",
    ):
        check_version(dataclasses.replace(version, uri=taken), given)
    check_version(
        dataclasses.replace(version, uri="s3://more/x/m/v1"), DeploySettings(uploads="s3://more/x/")
    )
    image = dataclasses.replace(version, uri=f"oci://quay.io/team/m@sha256:{'0' * 64}")
    with pytest.raises(UserError, match="not known where its uploads are"):
        check_version(image, DeploySettings())
    monkeypatch.delenv("AWS_S3_BUCKET")
    with pytest.raises(UserError, match="set AWS_S3_BUCKET, or deploy.uploads"):
        check_version(dataclasses.replace(version, uri="s3://b/models/m/v1"), DeploySettings())


def test_only_a_versions_own_folder_is_deleted(released: Version, store: dict[str, str]) -> None:
    client, root = s3_client(), f"s3://{services.BUCKET}/models"
    key = f"{below(released.uri)}/manifest.json"
    manifest = client.get_object(Bucket=services.BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=services.BUCKET, Key=f"{below(root)}/manifest.json", Body=manifest)
    other = f"{below(root)}/{NAME}/another/manifest.json"
    client.put_object(Bucket=services.BUCKET, Key=other, Body=manifest)
    before = list_keys(client, services.BUCKET, below(root))
    for uri in (root, f"{root}/{NAME}", f"s3://{services.BUCKET}"):
        assert not delete_version(uri, NAME, released.name)
    assert not delete_version(f"{root}/{NAME}/another", NAME, "another")  # its manifest is not
    assert list_keys(client, services.BUCKET, below(root)) == before
    assert delete_version(released.uri, NAME, released.name)
    gone = before.keys() - list_keys(client, services.BUCKET, below(root)).keys()
    assert gone == {each for each in before if each.startswith(f"{below(released.uri)}/")}
    client.delete_object(Bucket=services.BUCKET, Key=other)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "y.safetensors"])
def test_an_index_names_only_files_of_the_manifest(shard: str, tmp_path: Path) -> None:
    """Also where no digest is known: the manifest itself lists the index as it is."""
    index = json.dumps({"weight_map": {"w": shard}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "x.safetensors").write_bytes(b"x")
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in model_files(tmp_path).items()
    }
    write_manifest(tmp_path / "manifest.json", "nudge.upload", 1, {"files": files})
    with pytest.raises(Tampered, match="names the shard"):
        check(tmp_path)


def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(b"x")
    sha256 = hashlib.sha256(b"x").hexdigest()
    entry = {"x.safetensors": {"bytes": 1, "sha256": sha256}}
    write_manifest(folder / "manifest.json", "nudge.upload", 1, {"files": entry})
    check(folder, weights=weights_sha256({"x.safetensors": sha256}))
    (tmp_path / "outside").mkdir()
    (folder / "more").symlink_to(tmp_path / "outside")
    with pytest.raises(Tampered, match="more is neither a file nor a folder"):
        check(folder)
    (folder / "more").unlink()
    (folder / "empty.txt").touch()
    files = {**entry, "empty.txt": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}}
    write_manifest(folder / "manifest.json", "nudge.upload", 1, {"files": files})
    (folder / "empty.txt").unlink()
    check(folder, empty_missing=True)  # KServe downloads no empty object
    with pytest.raises(Tampered, match=r"empty\.txt is missing"):
        check(folder)
