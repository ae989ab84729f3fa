"""Uploads that are interrupted, disturbed and raced: one correct version, or none."""

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients import storage
from nudge.components.common.clients.bucket import download_folder
from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file
from nudge.components.common.local import processes
from nudge.components.upload import sending
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.local import services
from tests.faulty_proxy import FaultyProxy
from tests.objects import list_keys

PART = 5 << 20
SIZE = 4 * PART + 12_345
SETTINGS = UploadSettings(model_name="sent")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("store")
    yield services.up(home)
    services.down(home)
    assert not any(record.process() for record in processes.records(home))


@pytest.fixture
def direct(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client that talks to the store directly, without a proxy."""
    for key, value in store.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sending, "PART_BYTES", PART)
    return s3_client()


@pytest.fixture
def proxy(
    direct: Any,
    store: dict[str, str],
    faulty_proxy: Callable[..., FaultyProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> FaultyProxy:
    proxy = faulty_proxy(store["AWS_S3_ENDPOINT"], share=0.0, slow_s=0.05, retry_after_s=0)
    monkeypatch.setenv("AWS_S3_ENDPOINT", proxy.url)
    return proxy


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model with one file of five parts."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "more.safetensors").write_bytes(os.urandom(SIZE))
    return folder


def keys(client: Any, version: str) -> dict[str, int]:
    prefix = f"models/sent/{version}"
    found = list_keys(client, services.BUCKET, prefix)
    return {key.removeprefix(prefix + "/"): size for key, size in found.items()}


def unfinished(client: Any, version: str) -> list[Any]:
    prefix = f"models/sent/{version}/"
    answer = client.list_multipart_uploads(Bucket=services.BUCKET, Prefix=prefix)
    return list(answer.get("Uploads", []))


def check_whole(client: Any, folder: Path, version: str, into: Path) -> None:
    """The version exists, its bytes equal those of the folder, and no upload is unfinished."""
    download_folder(f"s3://{services.BUCKET}/models/sent/{version}", into)
    check_folder(folder, into)
    assert unfinished(client, version) == []


def check_folder(folder: Path, into: Path) -> None:
    """A downloaded version equals the folder and its manifest."""
    manifest = json.loads((into / "manifest.json").read_text())["files"]
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert manifest.keys() == files.keys()
    for name, path in files.items():
        entry = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        assert manifest[name] == entry
        assert sha256_file(into / name) == entry["sha256"]


def sent_parts(proxy: FaultyProxy) -> Counter[str]:
    """The number of times that each part of the large file reached the store."""
    numbers = [
        path.split("partNumber=")[1].split("&")[0]
        for method, path, _, fault in proxy.requests
        if method == "PUT" and "partNumber=" in path and fault == "passed"
    ]
    return Counter(numbers)


def puts(proxy: FaultyProxy) -> list[str]:
    return [path.split("?")[0] for method, path, *_ in proxy.requests if method == "PUT"]


def test_a_repeat_sends_only_what_is_missing(
    proxy: FaultyProxy, direct: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The store is gone after three parts of the large file.
    lock = threading.Lock()
    parts: list[str] = []

    def from_the_fourth(method: str, path: str) -> bool:
        with lock:
            if method == "PUT" and "partNumber=" in path:
                parts.append(path)
            return len(parts) > 3

    proxy.share, proxy.faults, proxy.only = 1.0, ("reset",), from_the_fourth
    monkeypatch.setattr(sending, "CONCURRENCY", 1)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    with pytest.raises(UserError, match="does not answer"):
        upload(SETTINGS, model=folder, version="again")
    assert "manifest.json" not in keys(direct, "again")
    first = sent_parts(proxy)
    complete = set(puts(proxy)) - {f"/{services.BUCKET}/models/sent/again/more.safetensors"}
    assert sum(first.values()) == 3
    assert complete

    proxy.share = 0.0
    proxy.requests.clear()
    upload(SETTINGS, model=folder, version="again")
    assert sent_parts(proxy).keys() == {"1", "2", "3", "4", "5"} - first.keys()
    assert set(sent_parts(proxy).values()) == {1}
    assert not complete & set(puts(proxy))
    check_whole(direct, folder, "again", tmp_path / "back")

    proxy.requests.clear()
    upload(SETTINGS, model=folder, version="again")
    manifest = f"/{services.BUCKET}/models/sent/again/manifest.json"
    assert puts(proxy) == [manifest]  # which is rejected


def test_a_file_that_changes_is_rejected(proxy: FaultyProxy, direct: Any, folder: Path) -> None:
    changed = folder / "more.safetensors"

    def change_it(method: str, path: str) -> bool:
        if "partNumber=2" in path:
            with changed.open("r+b") as file:
                file.write(b"other")
        return False

    proxy.only = change_it
    with pytest.raises(UserError, match="more.safetensors changed while it was uploaded"):
        upload(SETTINGS, model=folder, version="changing")
    assert not {"manifest.json", "more.safetensors"} & keys(direct, "changing").keys()

    # Now that it no longer changes, parts with the old content are not reused.
    proxy.only = lambda method, path: False
    upload(SETTINGS, model=folder, version="changing")
    check_whole(direct, folder, "changing", folder.parent / "back")


def test_bytes_that_the_store_corrupted_are_found_by_reading_back(
    proxy: FaultyProxy, direct: Any, folder: Path
) -> None:
    key = "models/sent/spoilt/more.safetensors"

    def spoil(method: str, path: str) -> bool:
        if method == "HEAD" and path.endswith(key):
            direct.put_object(Bucket=services.BUCKET, Key=key, Body=bytes(SIZE))
        return False

    proxy.only = spoil
    settings = UploadSettings(model_name="sent", read_back=True)
    with pytest.raises(UserError, match="more.safetensors differs from the file that was sent"):
        upload(settings, model=folder, version="spoilt")
    assert "manifest.json" not in keys(direct, "spoilt")
    proxy.only = lambda method, path: False
    with pytest.raises(UserError, match="more.safetensors has other content"):
        upload(settings, model=folder, version="spoilt")
    upload(settings, model=folder, version="sound")
    check_whole(direct, folder, "sound", folder.parent / "back")


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_one_of_two_simultaneous_writers_wins(
    proxy: FaultyProxy, direct: Any, folder: Path, tmp_path: Path, same: bool
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    if not same:
        (other / "more.safetensors").write_bytes(os.urandom(SIZE))
    version = f"race-{same}"
    ends: dict[Path, Exception | None] = {}
    meet = threading.Barrier(2)

    def write(model: Path) -> None:
        meet.wait()
        try:
            upload(SETTINGS, model=model, version=version)
            ends[model] = None
        except UserError as error:
            ends[model] = error

    threads = [threading.Thread(target=write, args=(model,)) for model in (folder, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.keys() == {folder, other}
    (winner, *_) = winners = [model for model, error in ends.items() if error is None]
    if same:
        assert len(winners) == 2
    else:
        (lost,) = [str(error) for error in ends.values() if error]
        assert "has other content" in lost or "already has another model" in lost
    check_whole(direct, winner, version, tmp_path / "back")


def test_a_version_is_never_overwritten(direct: Any, folder: Path, tmp_path: Path) -> None:
    upload(SETTINGS, model=folder, version="once")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "more.safetensors").write_bytes(os.urandom(SIZE))
    with pytest.raises(UserError, match="already has another model"):
        upload(SETTINGS, model=other, version="once")
    (folder / "additional.json").write_text("{}")
    with pytest.raises(UserError, match="already has another model"):
        upload(SETTINGS, model=folder, version="once")
    (folder / "additional.json").unlink()
    check_whole(direct, folder, "once", tmp_path / "back")


def disturbed(
    proxy: FaultyProxy, direct: Any, folder: Path, tmp_path: Path, runs: int
) -> Counter[str]:
    proxy.share = 0.2
    ends: Counter[str] = Counter()
    for run in range(runs):
        version = f"faults-{runs}-{run}"
        for _ in range(3):
            try:
                upload(SETTINGS, model=folder, version=version)
            except UserError:
                assert "manifest.json" not in keys(direct, version)
                ends["failed"] += 1
            else:
                ends["done"] += 1
                break
        proxy.share = 0.0
        check_whole(direct, folder, version, tmp_path / version)
        shutil.rmtree(tmp_path / version)
        proxy.share = 0.2
    assert ends["done"] == runs
    assert proxy.hurt > runs
    return ends


def test_three_runs_through_faults(
    proxy: FaultyProxy, direct: Any, folder: Path, tmp_path: Path
) -> None:
    disturbed(proxy, direct, folder, tmp_path, 3)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_many_runs_through_faults(
    proxy: FaultyProxy, direct: Any, folder: Path, tmp_path: Path
) -> None:
    runs = int(os.environ.get("NUDGE_TEST_FAULTY_RUNS", "20"))
    print(disturbed(proxy, direct, folder, tmp_path, runs), proxy.counts)
