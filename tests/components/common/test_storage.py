"""Folders of an object store: as consoles make them, and whole buckets."""

from pathlib import Path

import pytest
from nudge.components.common.errors import UserError
from nudge.components.common.storage import download_folder, s3_client


def below(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_folder_made_in_a_console_and_a_whole_bucket_are_downloaded(
    connected: dict[str, str], tmp_path: Path
) -> None:
    client = s3_client()
    client.create_bucket(Bucket="whole")
    contents = {"made/": b"", "made/a.txt": b"a", "made/in/": b"", "made/in/b.txt": b"b"}
    for key, body in {**contents, "empty/": b""}.items():
        client.put_object(Bucket="whole", Key=key, Body=body)
    listed = client.list_objects_v2(Bucket="whole", Prefix="made/")["Contents"]
    assert "made/" in [item["Key"] for item in listed]
    download_folder("s3://whole/made/", tmp_path / "folder")
    assert below(tmp_path / "folder") == {"a.txt": b"a", "in/b.txt": b"b"}
    for number, uri in enumerate(("s3://whole", "s3://whole/")):
        download_folder(uri, tmp_path / str(number))
        assert below(tmp_path / str(number)) == {"made/a.txt": b"a", "made/in/b.txt": b"b"}
    with pytest.raises(UserError, match="s3://whole/empty: there is nothing"):
        download_folder("s3://whole/empty", tmp_path / "none")
