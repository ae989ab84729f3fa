"""The store in a bucket, and downloads from one."""

import contextlib
import fnmatch
import io
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path

import botocore.exceptions

from nudge.components.common.clients.storage import code_of, s3_client, s3_errors, split_s3_uri
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.store import MANIFEST, Missing, Stored, deletion_order

ABSENT = ("404", "NoSuchKey")
EXISTS = ("ConditionalRequestConflict", "PreconditionFailed")


class BucketStore:
    """The objects below an ``s3://`` URI, which may be a complete bucket."""

    folder: Path | None = None

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.bucket, key = split_s3_uri(uri)
        self.start = f"{key}/" if key else ""
        """What the key of every object begins with."""
        self.client = s3_client()

    def list(self, below: str = "") -> dict[str, Stored]:
        start = self.start + (f"{below.rstrip('/')}/" if below else "")
        pages = self.client.get_paginator("list_objects_v2")
        found = {}
        with s3_errors(f"list {self._at(below)}"):
            for page in pages.paginate(Bucket=self.bucket, Prefix=start):
                for item in page.get("Contents", []):
                    name = item["Key"].removeprefix(self.start)
                    found[name] = Stored(item["Size"], item["LastModified"].timestamp())
        return found

    def children(self) -> Set[str]:
        pages = self.client.get_paginator("list_objects_v2")
        found = set()
        with s3_errors(f"list {self.uri}"):
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.start, Delimiter="/"):
                found |= {item["Key"] for item in page.get("Contents", [])}
                found |= {item["Prefix"] for item in page.get("CommonPrefixes", [])}
        return {key.removeprefix(self.start) for key in found}

    def read(self, name: str) -> bytes | None:
        body = io.BytesIO()
        with self._absent(name, "read"):
            # Unlike get_object, this resumes after a connection breaks in the middle.
            self.client.download_fileobj(self.bucket, self.start + name, body)
            return body.getvalue()
        return None

    def get(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._absent(name, "download"):
            self.client.download_file(self.bucket, self.start + name, str(path))
            return
        raise Missing(f"{self._at(name)} does not exist")

    def write(self, name: str, body: bytes, *, replace: bool = True) -> bool:
        condition = {} if replace else {"IfNoneMatch": "*"}
        with s3_errors(f"write {self._at(name)}"):
            try:
                self.client.put_object(
                    Bucket=self.bucket, Key=self.start + name, Body=body, **condition
                )
            except botocore.exceptions.ClientError as error:
                if replace or code_of(error) not in EXISTS:
                    raise
                return False
        return True

    def put(self, path: Path, name: str) -> None:
        with s3_errors(f"write {self._at(name)}"):
            self.client.upload_file(str(path), self.bucket, self.start + name)

    def delete(self, names: Iterable[str]) -> None:
        with s3_errors(f"delete files of {self.uri}"):
            for name in sorted(names, key=deletion_order):
                self.client.delete_object(Bucket=self.bucket, Key=self.start + name)

    def remove(self, below: str = "") -> None:
        self.delete(self.list(below))

    def _at(self, name: str) -> str:
        return f"{self.uri}/{name}" if name else self.uri

    @contextlib.contextmanager
    def _absent(self, name: str, doing: str) -> Iterator[None]:
        """Suppress the answer that an object does not exist."""
        with s3_errors(f"{doing} {self._at(name)}"):
            try:
                yield
            except botocore.exceptions.ClientError as error:
                if code_of(error) not in ABSENT:
                    raise


def download_folder(
    uri: str,
    folder: Path,
    files: tuple[str, ...] = ("*",),
    own: Callable[[set[str]], set[str]] = lambda names: set(),
) -> None:
    """Download the objects under an ``s3://`` URI (the complete bucket, if it names no key) whose
    keys match one of the patterns ``files``.

    ``own`` gets the relative names of what is to be downloaded, once ``manifest.json`` is in the
    folder, and returns those that it put there itself. Raises `UserError` if there is no object
    under the URI.
    """
    store = BucketStore(uri)
    # Consoles create a folder as an empty object whose key ends in a slash.
    names = [name for name in store.list() if name and not name.endswith("/")]
    if not names:
        raise UserError(f"{uri}: there is no object under this URI; check the bucket and the key")
    wanted = [
        name for name in names if any(fnmatch.fnmatch(store.start + name, each) for each in files)
    ]
    there: set[str] = set()
    for name in sorted(wanted, key=lambda name: name != MANIFEST):
        if name in there:
            continue
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UserError(f"{uri}: the key {store.start}{name} is a path outside the folder")
        store.get(name, path)
        if name == MANIFEST:
            there = own({each for each in wanted if each != MANIFEST})
