"""The folder through which a launcher and the pods of its job pass files to each other.

It is an ``s3://`` URI or a folder of a shared volume. A bundle is a folder of files beside
``<name>.json``, which lists their sizes and sha256 and is written last: a bundle is complete or
invisible.
"""

import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import published, sha256_file, verify_file, write_atomic
from nudge.components.common.core.uris import is_local, local_path

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints, for recipes that name no other."""

JOB_FOLDER = re.compile(r"nudge-[a-z0-9-]+-[0-9a-f]{8}")


class Handover:
    """One job's folder; made from its URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def send(self, name: str, source: Path) -> None:
        """Copy a file or folder there as ``name``; do nothing if the same bundle is there."""
        root, files = (source, _files(source)) if source.is_dir() else (source.parent, [source])
        listing = {
            path.relative_to(root).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in files
        }
        manifest = {"file": source.is_file(), "files": listing}
        if self.read(name) == manifest:
            return
        if is_local(self.uri):
            with published(local_path(self.uri) / name) as part:
                for path in files:
                    target = part / path.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
            write_atomic(local_path(self.uri) / f"{name}.json", json.dumps(manifest))
            return
        from nudge.components.common.clients.storage import s3_client, s3_errors, split_s3_uri

        client, (bucket, prefix) = s3_client(), split_s3_uri(self.uri)
        with s3_errors(f"upload {name} to {self.uri}"):
            for path in files:
                key = f"{prefix}/{name}/{path.relative_to(root).as_posix()}"
                client.upload_file(str(path), bucket, key, ExtraArgs={"ChecksumAlgorithm": "CRC32"})
            body = json.dumps(manifest).encode()
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}.json", Body=body)

    def read(self, name: str) -> dict[str, Any] | None:
        """The listing of the bundle ``name``, or None if there is no complete one."""
        if is_local(self.uri):
            path = local_path(self.uri) / f"{name}.json"
            return json.loads(path.read_text()) if path.is_file() else None
        import botocore.exceptions

        from nudge.components.common.clients.storage import s3_client, s3_errors, split_s3_uri

        bucket, prefix = split_s3_uri(self.uri)
        with s3_errors(f"read {self.uri}/{name}"):
            try:
                found = s3_client().get_object(Bucket=bucket, Key=f"{prefix}/{name}.json")
            except botocore.exceptions.ClientError as error:
                if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                    return None
                raise
            return dict(json.loads(found["Body"].read()))

    def fetch(self, name: str, target: Path) -> None:
        """Copy the bundle to ``target`` and verify it; `UserError` if it is missing or damaged."""
        manifest = self.read(name)
        if manifest is None:
            raise UserError(f"{self.uri} holds no complete {name}")
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            if is_local(self.uri):
                here = local_path(self.uri) / name
            else:
                from nudge.components.common.clients.storage import download_folder

                download_folder(f"{self.uri}/{name}", here)
            for file, listed in manifest["files"].items():
                verify_file(here / file, listed["sha256"])
            if manifest["file"]:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / next(iter(manifest["files"])), target)
                return
            with published(target) as part:
                for file in manifest["files"]:
                    (part / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(here / file, part / file)

    def clear(self, *, keep_checkpoints: bool = False) -> None:
        """Remove the folder, listings first, so that no bundle ever looks complete while it is not.

        With ``keep_checkpoints`` the checkpoints in it stay.
        """
        if is_local(self.uri):
            folder = local_path(self.uri)
            for path in folder.glob("*.json"):
                path.unlink()
            if not (keep_checkpoints and (folder / CHECKPOINTS).is_dir()):
                shutil.rmtree(folder, ignore_errors=True)
                return
            for path in folder.iterdir():
                if path.name != CHECKPOINTS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            return
        from nudge.components.common.clients.storage import (
            list_keys,
            s3_client,
            s3_errors,
            split_s3_uri,
        )

        client, (bucket, prefix) = s3_client(), split_s3_uri(self.uri)
        with s3_errors(f"remove {self.uri}"):
            keys = list_keys(client, bucket, prefix)
            if keep_checkpoints:
                kept = f"{prefix}/{CHECKPOINTS}/"
                keys = {key: size for key, size in keys.items() if not key.startswith(kept)}
            for key in sorted(keys, key=lambda key: not key.endswith(".json")):
                client.delete_object(Bucket=bucket, Key=key)


def idle_folders(root: str, idle_s: float) -> list[str]:
    """Names of the jobs whose folders in ``root`` nothing has written to for ``idle_s`` seconds."""
    newest: dict[str, float] = {}
    if is_local(root):
        for path in local_path(root).glob("*/**/*"):
            name = path.relative_to(local_path(root)).parts[0]
            newest[name] = max(newest.get(name, 0), path.lstat().st_mtime)
    else:
        from nudge.components.common.clients.storage import s3_client, s3_errors, split_s3_uri

        bucket, prefix = split_s3_uri(root)
        with s3_errors(f"list {root}"):
            pages = s3_client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}/"):
                for item in page.get("Contents", []):
                    name = item["Key"][len(prefix) + 1 :].split("/")[0]
                    newest[name] = max(newest.get(name, 0), item["LastModified"].timestamp())
    limit = time.time() - idle_s
    return sorted(name for name, at in newest.items() if at < limit and JOB_FOLDER.fullmatch(name))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
