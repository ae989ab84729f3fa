"""One object behind a URI, read in ranges.

A range that fails is requested again, at the same offset of the same version (ETag, or size and
time), and an object that changed in the meantime is detected.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nudge.components.common.readers import Records, read_stream, reason_unread, suffix_of
from nudge.components.ingest.downloads import Counting, WebLimits
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.stores import TRANSIENT, WEB, Vanished, with_retries

BLOCK_BYTES = 8 << 20
CHANGES = 3
"""An object that changes while it is being read is reread, this many attempts in total."""
NO_SETTINGS = WebLimits()


class Changed(Exception):
    """The version that was being read no longer exists."""


@dataclass(frozen=True)
class Source:
    """One object: its public name, its location, and its version and stored size if the listing
    has them."""

    uri: str
    file_system: Any
    path: str
    listed: str = ""
    bytes: int | None = None
    limits: WebLimits = NO_SETTINGS
    part: str = ""
    """The name of its source in `ingest.mix`."""
    skipped: str = ""
    """Why it is not read, such as ``hidden``; empty if only its kind decides."""

    @property
    def name(self) -> str:
        """The name that determines the format; only in a URL does a ``?`` or ``#`` end it."""
        return urlsplit(self.path).path if self.path.startswith(WEB) else self.path

    @property
    def suffix(self) -> str:
        """The suffix that determines the format, without that of the compression."""
        return suffix_of(self.name)

    @property
    def is_readable(self) -> bool:
        """Whether there is a reader for it; an object without one is listed and counted."""
        return not self.unread

    @property
    def unread(self) -> str:
        """The reason why it is not read; empty if it is read."""
        return self.skipped or reason_unread(self.name)

    def version(self) -> tuple[str, int | None]:
        """An identifier of this state of the object (ETag or modification time) and its stored
        size, if its store reports them."""
        return version_of(with_retries(lambda: self.file_system.info(self.path), self.uri))


class ResumableFile(io.RawIOBase):
    """An object as a seekable file, read in ranges; a range that fails is retried.

    If a server does not support ranges (some HTTP servers), the object is first copied to the local
    disk.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0
        self.version = source.version()
        self._file: Any = None
        size = self.version[1]
        self.size = self._copy() if size is None else size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.size - self._at))
        data = with_retries(lambda: self._range(wanted), self._source.uri) if wanted else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def check(self) -> None:
        """Raise `Changed` if the object changed since it was opened."""
        if self._source.version() != self.version:
            raise Changed

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    def _range(self, wanted: int) -> bytes:
        if self._file is None:
            options = {"block_size": BLOCK_BYTES} if self._source.uri[:4] != "file" else {}
            self._file = self._source.file_system.open(self._source.path, "rb", **options)
        try:
            self._file.seek(self._at)
            data = bytes(self._file.read(wanted))
            if len(data) == wanted:
                return data
            fault: BaseException = OSError(f"{len(data)} of {wanted} bytes arrived")
        except TRANSIENT as error:
            fault = error
        except ValueError:  # a server without ranges, as fsspec's HTTP reports it
            self._file.close()
            if self._copy() != self.size:
                raise Changed from None
            self._file.seek(self._at)
            return bytes(self._file.read(wanted))
        self._file.close()
        self._file = None
        self.check()
        raise fault

    def _copy(self) -> int:
        """Copy the object to a local file and read from there; returns its size in bytes."""
        with tempfile.NamedTemporaryFile(prefix="nudge-") as copy:
            get = self._source.file_system.get_file

            def download() -> None:
                count = Counting(self._source.limits, self._source.uri)
                get(self._source.path, copy.name, callback=count)

            with_retries(download, self._source.uri)
            self._file = open(copy.name, "rb")  # noqa: SIM115  outlives its name
            return os.fstat(self._file.fileno()).st_size


@contextlib.contextmanager
def opened(source: Source, settings: IngestSettings) -> Iterator[tuple[Records, ResumableFile]]:
    """The records of one version of an object, and its file.

    Raises `Changed` at the end if the object changed in the meantime, `Vanished` if it is gone.
    """
    with ResumableFile(source) as file:
        stream = io.BufferedReader(file, BLOCK_BYTES)
        yield read_stream(stream, source.name, settings.reading), file
        file.check()


def fetched(source: Source) -> bytes | None:
    """The bytes of a small object, or None if its version is no longer the listed one; `opened`
    then finds out what happened to it. None for web addresses too: a web server may send more than
    it announced, which only `opened` limits."""
    if source.path.startswith(WEB):
        return None
    try:
        data = bytes(with_retries(lambda: source.file_system.cat_file(source.path), source.uri))
        is_listed = len(data) == source.bytes and listed_version(*source.version()) == source.listed
    except Vanished:
        return None
    return data if is_listed else None


def version_of(info: dict[str, Any]) -> tuple[str, int | None]:
    keys = ("ETag", "etag", "blob_id", "mtime", "LastModified", "Last-Modified")
    return next((str(info[key]) for key in keys if info.get(key)), ""), info.get("size")


def listed_version(name: str, size: int | None) -> str:
    return f"{name} {size}" if name else ""
