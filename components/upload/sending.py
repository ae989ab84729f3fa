"""Send a file to an object store in parts that are hashed as they are read, each part once.

boto3's own transfer cannot resume an upload that another process began, so this module sends the
parts itself. An object is only created, never replaced (a conditional write): of two writers of one
key one wins, and the other finds what is there.
"""

import base64
import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore, Event, Lock
from typing import Any

import botocore.exceptions

from nudge.components.common.clients.bucket import BucketStore
from nudge.components.common.core.errors import UserError

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"""
CONCURRENCY = 4
"""Parts sent at once; these and the one being read are all that is in memory."""

LOST = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchUpload", "InvalidPart")
"""Error codes for a writer that was not the first, or whose first response was lost."""


class Taken(Exception):
    """The key exists with other content."""


@dataclass(frozen=True)
class Sent:
    """The size and sha256 of exactly the bytes that are in the store."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Unfinished:
    """A multipart upload that was begun; ``etags`` are its finished parts of this file."""

    id: str
    etags: dict[int, str] = field(default_factory=dict)


class Sender:
    """Sends files to a bucket's store; calls ``advance`` with the bytes of each part."""

    def __init__(self, store: BucketStore, advance: Callable[[float], None]) -> None:
        self._store, self._client, self._advance = store, store.client, advance
        self._free, self._counting = BoundedSemaphore(CONCURRENCY), Lock()
        self._pool = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="upload")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def send(self, path: Path, name: str, begun: list[str]) -> Sent:
        """Create ``name`` from a file; resume one of the uploads ``begun`` if it matches.

        Raises `Taken` if the file exists with other content, and `UserError` if the file changed.
        """
        size = path.stat().st_size
        part_bytes = part_size(size)
        try:
            if size <= part_bytes:
                return self._send_single(path, name)
            with unchanged(path):
                unfinished = self._adopt(path, name, begun, part_bytes) or self._begin(name)
                sent, parts = self._send_parts(path, name, unfinished, part_bytes)
            self._client.complete_multipart_upload(
                **self._object(name),
                UploadId=unfinished.id,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in LOST:
                raise
            return self.found(path, name)
        return sent

    def found(self, path: Path, name: str) -> Sent:
        """Compare the file with the existing object ``name``; raises `Taken` if they differ."""
        try:
            head = self._client.head_object(**self._object(name))
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "404":
                raise
            raise UserError(
                f"another program finished the upload of {name}; run the upload again"
            ) from None
        size = path.stat().st_size
        if head["ContentLength"] != size:
            raise Taken(name)
        sent, etag = _local(path, part_size(size))
        # ETags of a store that encrypts are not MD5 of the content, so compare the content.
        if head["ETag"].strip('"') != etag and self.read_back(name) != sent.sha256:
            raise Taken(name)
        return sent

    def read_back(self, name: str) -> str:
        """The sha256 of the bytes that the store returns for a file."""
        digest = _Digest()
        self._client.download_fileobj(**self._object(name), Fileobj=digest)
        return digest.sha256.hexdigest()

    def begun(self) -> dict[str, list[str]]:
        """The ids of unfinished uploads to the store, by file name, newest first."""
        pages = self._client.get_paginator("list_multipart_uploads")
        uploads: list[dict[str, Any]] = []
        # Without permission to list them, everything is sent again.
        with _allowed():
            for page in pages.paginate(Bucket=self._store.bucket, Prefix=self._store.start):
                uploads += page.get("Uploads", [])
        ids: dict[str, list[str]] = {}
        for upload in sorted(uploads, key=lambda each: each["Initiated"], reverse=True):
            name = upload["Key"].removeprefix(self._store.start)
            ids.setdefault(name, []).append(upload["UploadId"])
        return ids

    def forget(self) -> None:
        """Abort unfinished uploads to a complete version."""
        for name, ids in self.begun().items():
            for upload in ids:
                with _allowed("NoSuchUpload"):
                    self._client.abort_multipart_upload(**self._object(name), UploadId=upload)

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self._store.bucket, "Key": self._store.start + name}

    def _count(self, size: int) -> None:
        with self._counting:
            self._advance(size)

    def _send_single(self, path: Path, name: str) -> Sent:
        body = path.read_bytes()
        self._client.put_object(
            **self._object(name),
            Body=body,
            IfNoneMatch="*",
            ChecksumCRC32=_crc32(body),
        )
        self._count(len(body))
        return Sent(len(body), hashlib.sha256(body).hexdigest())

    def _begin(self, name: str) -> Unfinished:
        answer = self._client.create_multipart_upload(
            **self._object(name), ChecksumAlgorithm="CRC32"
        )
        return Unfinished(answer["UploadId"])

    def _adopt(self, path: Path, name: str, begun: list[str], part_bytes: int) -> Unfinished | None:
        """The first upload whose finished parts all match this file; None if there is none."""
        pages = self._client.get_paginator("list_parts")
        for upload in begun:
            parts: list[dict[str, Any]] = []
            with _allowed("NoSuchUpload"):
                for page in pages.paginate(**self._object(name), UploadId=upload):
                    parts += page.get("Parts", [])
            etags = {part["PartNumber"]: part["ETag"].strip('"') for part in parts}
            if etags and all(_md5(path, n, part_bytes) == etag for n, etag in etags.items()):
                return Unfinished(upload, etags)
        return None

    def _send_parts(
        self, path: Path, name: str, unfinished: Unfinished, part_bytes: int
    ) -> tuple[Sent, list[dict[str, Any]]]:
        """Send the missing parts; also returns the list of parts that completes the upload."""
        sha256, size, failed = hashlib.sha256(), 0, Event()

        def ended(future: Future[dict[str, Any]]) -> None:
            self._free.release()
            if future.cancelled() or future.exception():
                failed.set()

        parts: list[Future[dict[str, Any]] | dict[str, Any]] = []
        for number, body in enumerate(_parts(path, part_bytes), 1):
            sha256.update(body)
            size += len(body)
            if etag := unfinished.etags.get(number):
                parts.append({"PartNumber": number, "ETag": etag, "ChecksumCRC32": _crc32(body)})
                self._count(len(body))
                continue
            self._free.acquire()
            if failed.is_set():
                self._free.release()
                break
            future = self._pool.submit(self._send_part, name, unfinished.id, number, body)
            future.add_done_callback(ended)
            parts.append(future)
        done = [part.result() if isinstance(part, Future) else part for part in parts]
        return Sent(size, sha256.hexdigest()), done

    def _send_part(self, name: str, upload: str, number: int, body: bytes) -> dict[str, Any]:
        crc32 = _crc32(body)
        answer = self._client.upload_part(
            **self._object(name),
            UploadId=upload,
            PartNumber=number,
            Body=body,
            ChecksumCRC32=crc32,
        )
        self._count(len(body))
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": crc32}


def part_size(size: int) -> int:
    """Bytes per part for a file of ``size`` bytes; a file of one part is sent in one request."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


@contextlib.contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Raise `UserError` if the file changes during the block."""
    before = path.stat()
    yield
    if _identity(before) != _identity(path.stat()):
        raise UserError(
            f"{path} changed while it was uploaded; nothing of this version is visible. Upload it "
            "as another version when nothing writes to the folder"
        )


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@contextlib.contextmanager
def _allowed(*codes: str) -> Iterator[None]:
    """Ignore an error of the store that only costs time."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        if error.response["Error"]["Code"] not in ("AccessDenied", "NotImplemented", *codes):
            raise


class _Digest:
    """A file object that only hashes what is written to it."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return len(data)


def _parts(path: Path, part_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while body := file.read(part_bytes):
            yield body


def _md5(path: Path, number: int, part_bytes: int) -> str:
    with path.open("rb") as file:
        file.seek((number - 1) * part_bytes)
        return hashlib.md5(file.read(part_bytes), usedforsecurity=False).hexdigest()


def _crc32(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


def _local(path: Path, part_bytes: int) -> tuple[Sent, str]:
    """A file's size and sha256, and the ETag that S3 gives it without encryption."""
    sha256, size, digests = hashlib.sha256(), 0, []
    for body in _parts(path, part_bytes):
        sha256.update(body)
        size += len(body)
        digests.append(hashlib.md5(body, usedforsecurity=False))
    if size <= part_bytes:
        etag = (digests or [hashlib.md5(usedforsecurity=False)])[0].hexdigest()
    else:
        joined = b"".join(digest.digest() for digest in digests)
        etag = f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(digests)}"
    return Sent(size, sha256.hexdigest()), etag
