"""What a launcher and the pods of its job hand each other: a folder that both reach.

It is an ``s3://`` URI or a folder of a shared volume. A bundle in it is a folder of files beside
``<name>.json``, their sizes and sha256, which is written last: complete or invisible.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import published, sha256_file, verify_file, write_atomic
from nudge.components.common.core.uris import is_local, local_path


class Exchange:
    """One job's folder; made from its URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def send(self, name: str, source: Path) -> None:
        """Bring a file or folder there under ``name``; does nothing if the same is there."""
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
        with s3_errors(f"hand {name} over at {self.uri}"):
            for path in files:
                key = f"{prefix}/{name}/{path.relative_to(root).as_posix()}"
                client.upload_file(str(path), bucket, key, ExtraArgs={"ChecksumAlgorithm": "CRC32"})
            body = json.dumps(manifest).encode()
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}.json", Body=body)

    def read(self, name: str) -> dict[str, Any] | None:
        """The listing of what is there under ``name``, or None if nothing complete is."""
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
        """Bring it here as ``target``, verified; raises `UserError` if it is missing or damaged."""
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
            for file, told in manifest["files"].items():
                verify_file(here / file, told["sha256"])
            if manifest["file"]:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / next(iter(manifest["files"])), target)
                return
            with published(target) as part:
                for file in manifest["files"]:
                    (part / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(here / file, part / file)

    def clear(self) -> None:
        """Remove all of it: what is complete first, so that nobody takes a part for the whole."""
        if is_local(self.uri):
            for path in local_path(self.uri).glob("*.json"):
                path.unlink()
            shutil.rmtree(local_path(self.uri), ignore_errors=True)
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
            for key in sorted(keys, key=lambda key: not key.endswith(".json")):
                client.delete_object(Bucket=bucket, Key=key)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
