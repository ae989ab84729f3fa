"""A model as an image in a real registry: complete or invisible, never replaced, read back."""

import json
import os
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.model import BaseModel, ModelFacts, write_model_facts
from nudge.components.common.clients import image_registry, modelcar
from nudge.components.common.clients.image_reference import parse_reference
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import model_sha256
from nudge.components.common.models.registered import check_download, download_model
from nudge.components.upload import image
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from tests.components.upload.test_sending import check_folder
from tests.faulty_proxy import FaultyProxy
from tests.image_registry import PASSWORD, ImageRegistry, make_base_image

LARGE = 3 << 20


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageRegistry]:
    with ImageRegistry(tmp_path_factory.mktemp("registry")) as registry:
        make_base_image(f"oci://{registry.host}/base/micro:9.6")
        yield registry


@pytest.fixture
def proxy(registry: ImageRegistry, faulty_proxy: Callable[..., FaultyProxy]) -> FaultyProxy:
    return faulty_proxy(f"http://{registry.host}", share=0.0, slow_s=0.05, retry_after_s=0)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of three large files and some small ones, one of them in a folder."""
    monkeypatch.setattr(image, "SMALL_BYTES", 1 << 20)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for number in range(3):
        (folder / f"more-{number}.safetensors").write_bytes(os.urandom(LARGE))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def settings_at(host: str, name: str = "sent", **more: Any) -> UploadSettings:
    base = f"{host}/base/micro:9.6"
    return UploadSettings(model_name=name, target=f"oci://{host}/team", base_image=base, **more)


def send(host: str, folder: Path, version: str, **more: Any) -> str:
    return str(upload(settings_at(host, **more), model=folder, version=version)["uri"])


def tag(registry: ImageRegistry, version: str, name: str = "sent") -> str:
    """The digest of a tag; empty if the tag does not exist."""
    with image_registry.repository(parse_reference(f"oci://{registry.host}/team/{name}")) as found:
        return found.digest(version)


def check_image(registry: ImageRegistry, uri: str, folder: Path, into: Path) -> None:
    """It exists under its digest, and the model's bytes equal those of the folder."""
    digest = uri.rpartition("@")[2]
    download_model(f"oci://{registry.host}/team/sent@{digest}", into)
    check_download(into, uri)
    check_folder(folder, into)


def test_a_model_is_an_image_for_every_platform_of_the_base(
    registry: ImageRegistry, folder: Path, tmp_path: Path
) -> None:
    uri = send(registry.host, folder, "v1", read_back=True)
    assert uri == f"oci://{registry.host}/team/sent@{tag(registry, 'v1')}"
    with image_registry.repository(parse_reference(uri)) as found:
        found_images = modelcar.image_manifests(found, parse_reference(uri))
        assert {each["architecture"] for each, _ in found_images} == {"amd64", "arm64"}
        for platform, manifest in found_images:
            config = json.loads(found.blob(manifest["config"]["digest"]))
            assert config["architecture"] == platform["architecture"]
            # A runtime unpacks layers by these, and rejects an image with another number of them.
            assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"]) == 1 + 3 + 1
            assert len(config["history"]) == 1 + 3 + 1
            for layer, diff in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
                plain = layer["mediaType"] == image_registry.LAYER
                assert plain == (layer["digest"] == diff)
                assert registry.blob(layer["digest"]).stat().st_size == layer["size"]
    for layer in found_images[0][1]["layers"][1:]:
        with tarfile.open(registry.blob(layer["digest"])) as archive:
            for member in archive:
                assert member.name == "models" or member.name.startswith("models/")
                assert (member.uid, member.gid, member.mtime) == (0, 0, 0)
                assert member.mode == (0o755 if member.isdir() else 0o644)
    check_image(registry, uri, folder, tmp_path / "back")

    tokenizer = tmp_path / "tokenizer"
    download_model(uri, tokenizer, ("*.json",))
    names = {path.relative_to(tokenizer).as_posix() for path in tokenizer.rglob("*.*")}
    assert {"tokenizer.json", "adapter/adapter_config.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)


def test_a_repeated_upload_sends_nothing_and_another_model_is_rejected(
    registry: ImageRegistry, proxy: FaultyProxy, folder: Path, tmp_path: Path
) -> None:
    host = proxy.url.removeprefix("http://")
    uri = send(host, folder, "once")
    assert tag(registry, "once") == uri.rpartition("@")[2]
    proxy.requests.clear()
    assert send(host, folder, "once") == uri
    # A changed base image does not make it another model.
    make_base_image(f"oci://{registry.host}/base/micro:9.6", ("amd64",))
    assert send(host, folder, "once") == uri
    assert {method for method, *_ in proxy.requests} <= {"GET", "HEAD"}

    (folder / "more-1.safetensors").write_bytes(os.urandom(LARGE))
    with pytest.raises(UserError, match="already has another model; a version is never"):
        send(host, folder, "once")
    assert {method for method, *_ in proxy.requests} <= {"GET", "HEAD"}
    assert tag(registry, "once") == uri.rpartition("@")[2]
    # Common layers are not sent twice.
    send(host, folder, "twice")
    puts = [path for method, path, *_ in proxy.requests if method == "PUT" and "/blobs/" in path]
    assert len(puts) == 1 + 1 + 1  # large file, small files with manifest, configuration
    make_base_image(f"oci://{registry.host}/base/micro:9.6")


def test_the_second_of_two_writers_of_one_tag_is_rejected(
    registry: ImageRegistry, proxy: FaultyProxy, folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "more-0.safetensors").write_bytes(os.urandom(LARGE))
    first: list[str] = []

    def another(method: str, path: str) -> bool:
        if method == "PUT" and "/manifests/sha256:" in path and not first:
            first.append("")
            first[0] = send(registry.host, other, "race")
        return False

    proxy.only = another
    host = proxy.url.removeprefix("http://")
    # It looked before the other one existed, and notices when it looks again.
    with pytest.raises(UserError, match="already has another model"):
        send(host, folder, "race")
    assert tag(registry, "race") == first[0].rpartition("@")[2]
    check_image(registry, first[0], other, tmp_path / "back")


def test_a_changing_file_and_weights_of_another_training_are_rejected(
    registry: ImageRegistry, proxy: FaultyProxy, folder: Path
) -> None:
    changed = folder / "more-2.safetensors"

    def change_it(method: str, path: str) -> bool:
        if method == "POST" and "/uploads/" in path:
            changed.write_bytes(os.urandom(LARGE + 1))
        return False

    proxy.only = change_it
    with pytest.raises(UserError, match="changed while it was uploaded"):
        send(proxy.url.removeprefix("http://"), folder, "changing")
    assert tag(registry, "changing") == ""

    facts = ModelFacts(
        base_model=BaseModel(uri="", sha256=""),
        data_fingerprint="",
        tokenizer_sha256="",
        settings={},
        seed=1,
        code_version="",
        weights_sha256=model_sha256(folder),
    )
    write_model_facts(folder, facts)
    send(registry.host, folder, "trained")
    changed.write_bytes(os.urandom(LARGE))
    with pytest.raises(UserError, match="training wrote [0-9a-f]{64}: they were changed since"):
        send(registry.host, folder, "spoilt")
    assert tag(registry, "spoilt") == ""


def test_a_blob_that_the_registry_corrupted_is_found(
    registry: ImageRegistry, folder: Path, tmp_path: Path
) -> None:
    uri = send(registry.host, folder, "kept")
    with image_registry.repository(parse_reference(uri)) as found:
        layer = modelcar.image_manifests(found, parse_reference(uri))[0][1]["layers"][1]
    path = registry.blob(layer["digest"])
    body = bytearray(path.read_bytes())
    body[LARGE // 2] ^= 1
    path.write_bytes(body)
    try:
        with pytest.raises(UserError, match="is damaged: its content has the digest"):
            download_model(uri, tmp_path / "back")
    finally:
        body[LARGE // 2] ^= 1
        path.write_bytes(body)


@pytest.mark.parametrize(
    ("target", "version", "said"),
    [
        ("oci://noregistry/team", "v1", "is not the name of an image"),
        ("oci://quay.io/Team", "v1", "with the path in lower case"),
        ("oci://quay.io/team", "v 1", "the version .v 1. is refused"),
        ("oci://quay.io/team", "v" * 129, "is refused"),
    ],
)
def test_invalid_names_are_rejected(folder: Path, target: str, version: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        upload(UploadSettings(model_name="m", target=target), model=folder, version=version)


@pytest.mark.parametrize("access", [pytest.param("basic", marks=pytest.mark.long), "token"])
def test_credentials_come_from_a_pull_secret_and_are_never_printed(
    access: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("HOME", str(tmp_path))  # the developer may be logged in to a registry
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    secret = tmp_path / "secret.json"
    with ImageRegistry(tmp_path / "registry", access=access) as registry:
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(registry.pull_secret(secret)))
        make_base_image(f"oci://{registry.host}/base/micro:9.6")
        uri = send(registry.host, folder, "v1")
        download_model(uri, tmp_path / "back")
        check_folder(folder, tmp_path / "back")

        registry.pull_secret(secret, password="not-it")
        with pytest.raises(UserError, match="answered 401") as wrong:
            send(registry.host, folder, "v2")
        # An entry for part of the registry overrides the entry for the registry.
        entries = json.loads(secret.read_text())["auths"]
        right = json.loads(registry.pull_secret(tmp_path / "right.json").read_text())["auths"]
        entries[f"{registry.host}/team"] = entries[f"{registry.host}/base"] = right[registry.host]
        secret.write_text(json.dumps({"auths": entries}))
        send(registry.host, folder, "v2")

        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none.json"))
        with pytest.raises(UserError, match="provide a pull secret for it") as lacking:
            send(registry.host, folder, "v3")
        output = f"{wrong.value}{lacking.value}{caplog.text}"
    for each in (PASSWORD, "not-it", *(e["auth"] for e in entries.values()), "Bearer ey"):
        assert each not in output


def disturbed(
    registry: ImageRegistry, proxy: FaultyProxy, folder: Path, tmp_path: Path, runs: int
) -> Counter[str]:
    ends: Counter[str] = Counter()
    host = proxy.url.removeprefix("http://")
    for run in range(runs):
        version = f"faults-{runs}-{run}"
        (folder / "more-0.safetensors").write_bytes(os.urandom(LARGE))
        proxy.share = 0.2
        for _ in range(3):
            try:
                uri = send(host, folder, version)
            except UserError:
                assert tag(registry, version) == ""
                ends["failed"] += 1
            else:
                ends["done"] += 1
                break
        assert tag(registry, version) == uri.rpartition("@")[2]
        download_model(uri, tmp_path / version)
        check_folder(folder, tmp_path / version)
        shutil.rmtree(tmp_path / version)
        proxy.share = 0.0
    assert ends["done"] == runs
    assert proxy.hurt > runs
    return ends


def test_two_runs_through_faults(
    registry: ImageRegistry, proxy: FaultyProxy, folder: Path, tmp_path: Path
) -> None:
    disturbed(registry, proxy, folder, tmp_path, 2)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_many_runs_through_faults(
    registry: ImageRegistry, proxy: FaultyProxy, folder: Path, tmp_path: Path
) -> None:
    runs = int(os.environ.get("NUDGE_TEST_FAULTY_RUNS", "20"))
    print(disturbed(registry, proxy, folder, tmp_path, runs), proxy.counts)


@pytest.mark.long
def test_an_upload_interrupted_after_any_request_is_invisible_and_then_complete(
    registry: ImageRegistry, proxy: FaultyProxy, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The registry is gone from the n-th change on, as if the sender were killed."""
    monkeypatch.setattr(image_registry, "ATTEMPTS", 1)
    monkeypatch.setattr(image, "CONCURRENCY", 1)
    host, lock, seen = proxy.url.removeprefix("http://"), threading.Lock(), [0]
    proxy.share, proxy.faults = 1.0, ("lost",)
    for at in range(1, 100):
        version = f"cut-{at}"
        (folder / "more-0.safetensors").write_bytes(os.urandom(LARGE))
        seen[0] = 0

        def gone(method: str, path: str, at: int = at) -> bool:
            with lock:
                seen[0] += method not in ("GET", "HEAD")
                return seen[0] >= at

        proxy.only = gone
        try:
            uri = send(host, folder, version)
        except UserError:
            there = tag(registry, version)
            last = seen[0] >= at and there  # the tag was written, only the response was lost
            proxy.only = lambda method, path: False
            uri = send(host, folder, version)
            assert not last or there == uri.rpartition("@")[2]
        else:
            break
        assert tag(registry, version) == uri.rpartition("@")[2]
        check_image(registry, uri, folder, tmp_path / version)
    assert at > 8
