"""The store behaves the same in a folder and in a bucket."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nudge.components.common.clients.bucket import BucketStore
from nudge.components.common.clients.store import open_store
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.store import Missing, Store, deletion_order


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "folder":
        yield open_store(str(tmp_path / "store"))
        return
    request.getfixturevalue("connected")
    yield open_store(f"s3://nudge/{uuid.uuid4().hex}/")


def test_files_are_written_listed_and_read(store: Store, tmp_path: Path) -> None:
    assert store.list() == {}
    assert store.children() == set()
    assert store.read("a.json") is None
    with pytest.raises(Missing, match="a.json does not exist"):
        store.get("a.json", tmp_path / "back")
    (tmp_path / "file").write_bytes(b"12345")
    store.put(tmp_path / "file", "one/two/b")
    assert store.write("a.json", b"{}")
    assert {name: each.bytes for name, each in store.list().items()} == {
        "one/two/b": 5,
        "a.json": 2,
    }
    assert set(store.list("one")) == {"one/two/b"}
    assert store.list("on") == {}
    assert store.children() == {"one/", "a.json"}
    assert store.read("a.json") == b"{}"
    store.get("one/two/b", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == b"12345"


def test_a_file_is_created_only_once(store: Store) -> None:
    assert store.write("new/manifest.json", b"1", replace=False)
    assert not store.write("new/manifest.json", b"2", replace=False)
    assert store.read("new/manifest.json") == b"1"
    assert store.write("new/manifest.json", b"2")
    assert store.read("new/manifest.json") == b"2"
    assert set(store.list()) == {"new/manifest.json"}


def test_folders_and_files_are_deleted(store: Store) -> None:
    for name in ("one/manifest.json", "one/a", "one-more/a", "b"):
        store.write(name, b"x")
    store.delete(["b", "never-there"])
    store.remove("one")
    store.remove("never-there/")
    assert set(store.list()) == {"one-more/a"}
    store.remove()
    assert store.list() == {}


def test_a_manifest_is_deleted_first() -> None:
    names = ["a.bin", "config.json", "part/manifest.json", "z", "manifest.json"]
    assert sorted(names, key=deletion_order)[:3] == [
        "manifest.json",
        "part/manifest.json",
        "config.json",
    ]


def test_a_failed_copy_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(FileNotFoundError):
        store.put(tmp_path / "missing", "file")
    assert store.list() == {}


def test_a_refusal_names_the_file(
    connected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = BucketStore("s3://nudge/below")
    for action in (lambda: store.write("a", b""), lambda: store.put(Path(__file__), "a")):
        with pytest.raises(UserError, match="write s3://nudge/below/a: SignatureDoesNotMatch"):
            action()
    with pytest.raises(UserError, match="list s3://nudge/below: SignatureDoesNotMatch"):
        store.list()
