"""Where text comes from: objects behind URIs, found and read by fsspec.

An object is read in ranges; a range that fails is asked for again, at the same offset of the same
version (ETag, or size and time), and an object that changed meanwhile is told apart.
"""

import asyncio
import collections
import contextlib
import dataclasses
import io
import itertools
import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import botocore.exceptions
import fsspec
import tenacity

from nudge.components.common.clients.storage import HINTS, connection
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.uris import is_local, package_path
from nudge.components.common.readers import (
    Records,
    accepted,
    hidden_part,
    read_stream,
    reason_unread,
    suffix_of,
)
from nudge.components.ingest.downloads import Client, Counting, WebLimits
from nudge.components.ingest.listing import MAGIC, local_files, local_name, named_uris
from nudge.components.ingest.settings import IngestSettings

WEB = ("http://", "https://")
BLOCK_BYTES = 8 << 20
ATTEMPTS = 10
STORE_ATTEMPTS = 8
"""How often botocore itself tries a request, before it counts as one of `ATTEMPTS`."""
CHANGES = 3
"""An object that changes while it is read is read again, this many times in all."""
TRANSIENT = (
    OSError,
    asyncio.TimeoutError,
    aiohttp.ClientError,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.HTTPClientError,
)

NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
)
LASTING = (
    PermissionError,
    *NO_CREDENTIALS,
    # Asked for `STORE_ATTEMPTS` times already.
    botocore.exceptions.EndpointConnectionError,
    botocore.exceptions.SSLError,
    aiohttp.ClientSSLError,
    aiohttp.InvalidURL,  # also a redirect to another scheme than http and https
)


NO_SETTINGS = WebLimits()


class Changed(Exception):
    """An object is no longer the version that was begun."""


class Vanished(Exception):
    """An object is gone."""


@dataclass(frozen=True)
class Source:
    """One object: its public name, where it is, and its version and its bytes as stored where the
    listing told them."""

    uri: str
    file_system: Any
    path: str
    listed: str = ""
    bytes: int | None = None
    limits: WebLimits = NO_SETTINGS
    skipped: str = ""
    """Why it is not read, such as ``hidden``; empty where its kind alone decides."""

    @property
    def name(self) -> str:
        """What tells the format; in a URL alone a ``?`` or ``#`` ends it."""
        return urlsplit(self.path).path if self.path.startswith(WEB) else self.path

    @property
    def suffix(self) -> str:
        """The suffix that tells the format, without that of the compression."""
        return suffix_of(self.name)

    @property
    def is_readable(self) -> bool:
        """Whether there is a reader for it; what has none is named and counted."""
        return not self.unread

    @property
    def unread(self) -> str:
        """The reason why it is not read; empty if it is."""
        return self.skipped or reason_unread(self.name)

    def version(self) -> tuple[str, int | None]:
        """What names this state of the object (ETag or time of change), and its bytes as stored,
        where its store tells them."""
        return _version(with_retries(lambda: self.file_system.info(self.path), self.uri))


class ResumableFile(io.RawIOBase):
    """An object as a seekable file, read in ranges, each tried again from where it stood.

    What cannot be read in ranges (some HTTP servers) is copied to this machine's disk first.
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
        """Raise `Changed` if the object is no longer the one that was opened."""
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
            fault: BaseException = OSError(f"{len(data)} of {wanted} bytes came")
        except TRANSIENT as error:
            fault = error
        except ValueError:  # fsspec's HTTP met a server without ranges
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
        """Copy the object to a file of this machine, and read from there; returns its bytes."""
        with tempfile.NamedTemporaryFile(prefix="nudge-") as copy:
            get = self._source.file_system.get_file

            def download() -> None:
                count = Counting(self._source.limits, self._source.uri)
                get(self._source.path, copy.name, callback=count)

            with_retries(download, self._source.uri)
            self._file = open(copy.name, "rb")  # noqa: SIM115  outlives its name
            return os.fstat(self._file.fileno()).st_size


def _version(info: dict[str, Any]) -> tuple[str, int | None]:
    keys = ("ETag", "etag", "blob_id", "mtime", "LastModified", "Last-Modified")
    return next((str(info[key]) for key in keys if info.get(key)), ""), info.get("size")


def with_retries(work: Any, uri: str) -> Any:
    """Do what a store may refuse for a while; raises `Vanished`, or `UserError` if it never can."""

    def temporary(error: BaseException) -> bool:
        # fsspec's HTTP says "not found" of any failure, and keeps the true one as its cause.
        if isinstance(error, FileNotFoundError) and isinstance(
            error.__cause__, aiohttp.ClientError
        ):
            error = error.__cause__
            if getattr(error, "status", 0) in (404, 410):
                return False
        elif isinstance(error, FileNotFoundError):
            return False
        return isinstance(error, TRANSIENT) and not isinstance(error, LASTING)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(temporary),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(0.1, 20),
        reraise=True,
    )
    try:
        return retrying(work)
    except FileNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, UserError):  # fsspec's HTTP hides it
            raise cause from None
        if temporary(error) or isinstance(cause, LASTING):
            raise UserError(f"{uri}: cannot be read: {why(cause or error)}") from None
        raise Vanished from None
    except TRANSIENT as error:
        raise UserError(f"{uri}: cannot be read: {why(error)}") from None


def why(error: BaseException) -> str:
    """What a store's error comes down to, and what to do about it."""
    endpoint = os.environ.get("AWS_S3_ENDPOINT", "")
    credentials = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if isinstance(error, NO_CREDENTIALS):
        missing = [name for name in credentials if not os.environ.get(name)]
        return (
            f"{' and '.join(missing)} not set; attach a data connection, or run "
            "`nudge services up` on a laptop"
        )
    if isinstance(error, botocore.exceptions.EndpointConnectionError):
        return f"the object store {endpoint} does not answer; check AWS_S3_ENDPOINT"
    if isinstance(error, botocore.exceptions.SSLError):
        return f"the certificate of {endpoint} is not trusted; name its CA's file in AWS_CA_BUNDLE"
    if isinstance(error, aiohttp.ClientSSLError):
        return "its certificate is not trusted; name its CA's file in SSL_CERT_FILE"
    if isinstance(error, ValueError) and "Invalid endpoint" in str(error):
        return f"AWS_S3_ENDPOINT is {endpoint!r}; expected http://host:port or https://host"
    # s3fs keeps the store's own words, but the code only in the cause.
    cause: Any = error.__cause__ or error
    if isinstance(cause, botocore.exceptions.ClientError):
        code = cause.response.get("Error", {}).get("Code", "")
        return f"{code} from {endpoint or 'S3'}: {HINTS.get(code, error)}"
    return str(error) or type(error).__name__


def find_sources(data_uri: str | Sequence[str], limits: WebLimits | None = None) -> list[Source]:
    """Every file that the URIs name, in a fixed order, folders and globs expanded.

    What `listing.named_uris` says of ``data_uri`` holds; hidden and special files come with the
    reason why they are not read.

    URLs that differ only in what is not told of them (their queries) are numbered, and not known
    again by the next run. Raises `UserError` if a URI names nothing, or names a file of an unknown
    kind; those that lie in a folder are among the sources.
    """
    uris = named_uris(data_uri)
    for uri in uris:
        _check_scheme(uri)
    if isinstance(data_uri, str) and len(uris) > 1 and _is_remote_name(data_uri.strip()):
        uris = [data_uri.strip()]
    named = (source for uri in uris for source in _expand(uri, limits or WebLimits()))
    found = {(source.file_system, source.path): source for source in named}
    if not found:
        raise UserError("ingest.data_uri names no source; give a file, a folder or a glob")
    ordered = sorted(found.values(), key=lambda source: (source.uri, source.path))
    told: list[Source] = []
    for _, group in itertools.groupby(ordered, lambda source: source.uri):
        first, *others = group
        if others:
            first = dataclasses.replace(first, listed="")
        told.append(first)
        for number, other in enumerate(others, 2):
            told.append(dataclasses.replace(other, uri=f"{other.uri} ({number})", listed=""))
    return told


@contextlib.contextmanager
def opened(source: Source, settings: IngestSettings) -> Iterator[tuple[Records, ResumableFile]]:
    """The records of one version of an object, and its file.

    Raises `Changed` at the end if the object changed meanwhile, `Vanished` if it is gone.
    """
    with ResumableFile(source) as file:
        stream = io.BufferedReader(file, BLOCK_BYTES)
        yield read_stream(stream, source.name, settings.reading), file
        file.check()


def fetched(source: Source) -> bytes | None:
    """The bytes of a small object if they are those of the version that was listed, else None: then
    `opened` finds out what became of it. A web server may send more than it said, so `opened` reads
    what it has."""
    if source.path.startswith(WEB):
        return None
    try:
        data = bytes(with_retries(lambda: source.file_system.cat_file(source.path), source.uri))
        is_listed = len(data) == source.bytes and _listed(*source.version()) == source.listed
    except Vanished:
        return None
    return data if is_listed else None


def s3_options() -> dict[str, Any]:
    """fsspec's options for the data connection; without keys botocore looks for its own."""
    given = connection()
    return {
        "key": given.key or None,
        "secret": given.secret or None,
        "token": given.token or None,
        "use_listings_cache": False,
        # Another connection or another day's credentials are no reason to use the last ones.
        "skip_instance_cache": True,
        "client_kwargs": given.client_options(),
        "config_kwargs": {
            **given.config_options(),
            "retries": {"total_max_attempts": STORE_ATTEMPTS, "mode": "standard"},
        },
    }


def file_system_of(uri: str, setting: str, limits: WebLimits | None = None) -> tuple[Any, str]:
    """fsspec's file system for a URI, and the path in it; ``setting`` is whose URI it is."""
    options = s3_options() if uri.startswith("s3://") else {}
    if uri.startswith(WEB):
        options = {"get_client": Client(urlsplit(uri).hostname or "", limits or WebLimits())}
    try:
        file_system, path = fsspec.core.url_to_fs(uri, **options)
    except (*TRANSIENT, ValueError, ImportError) as error:
        raise UserError(f"{setting} {uri}: cannot be opened: {why(error)}") from None
    return file_system, path.rstrip("/") or path


SCHEMES = ("package", "file", "s3", "hf", "https", "http", "gs", "gcs", "az", "abfs", "abfss")
"""Chained and code-running schemes of fsspec are none of them."""


def _check_scheme(uri: str) -> None:
    scheme, separator, _ = uri.partition("://")
    is_chained = "::" in uri.partition("?")[0] and not is_local(uri)
    if (separator and scheme.lower() not in SCHEMES) or is_chained:
        raise UserError(
            f"ingest.data_uri {uri}: this scheme is not read; accepted are a path and "
            f"{', '.join(f'{each}://' for each in SCHEMES)}"
        )


def _is_remote_name(uri: str) -> bool:
    """Whether a text with blanks is the one name of an object or folder in a store."""
    first, *others = uri.split()
    if first.partition("://")[0] not in ("s3", "gs", "gcs", "az", "abfs", "abfss", "hf"):
        return False
    if "\n" in uri or any("://" in other or other.startswith("/") for other in others):
        return False
    file_system, path = file_system_of(uri, "ingest.data_uri")
    return bool(with_retries(lambda: file_system.exists(path), uri))


def _expand(uri: str, limits: WebLimits) -> list[Source]:
    if is_local(uri):
        found = _found_here(uri)
        target = str(package_path(uri)) if uri.startswith("package://") else local_name(uri)
        return _usable(uri, found, os.path.isdir(target))
    file_system, path = file_system_of(uri, "ingest.data_uri", limits)
    if uri.startswith(WEB) and "*" not in uri and not reason_unread(urlsplit(uri).path):
        source = Source(_public(uri, path), file_system, path, limits=limits)
        try:
            name, size = source.version()
            limits.check_size(size, source.uri)
            return [dataclasses.replace(source, listed=_listed(name, size), bytes=size)]
        except Vanished:
            raise UserError(f"ingest.data_uri {source.uri}: there is no such file") from None
    try:
        path, is_named = _name_or_pattern(file_system, path, uri)
        is_folder = is_named and with_retries(lambda: file_system.isdir(path), uri)
        if is_folder and any(mark in path for mark in MAGIC):
            infos = with_retries(lambda: file_system.find(path, detail=True), uri)
        elif is_named and not is_folder and any(mark in path for mark in MAGIC):
            infos = {path: with_retries(lambda: file_system.info(path), uri)}
        else:
            pattern = posixpath.join(path, "**") if is_folder else path
            infos = with_retries(lambda: file_system.glob(pattern, detail=True), uri)
    except Vanished:
        infos, is_folder = {}, False
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"ingest.data_uri {uri}: cannot be listed: {why(error)}") from None
    # Some stores list a folder as a file of its own name; those end in a slash.
    files = {
        p: info
        for p, info in sorted(infos.items())
        if info.get("type") != "directory" and not p.endswith("/")
    }
    root = path if is_folder else posixpath.dirname(path.partition("*")[0].partition("?")[0])
    sources: dict[str, Source] = {}
    for p, info in files.items():
        inside = posixpath.relpath(p, root) if p.startswith(root) else p
        if is_folder and (hidden := hidden_part(inside)):
            # A hidden folder is one thing that is skipped, however many objects are in it.
            end = p.index(f"/{hidden}", len(root)) + 1 + len(hidden)
            p, info = p[:end], {}
            sources[p] = Source(_public(uri, p), file_system, p, skipped="hidden")
            continue
        version = _listed(*_version(info))
        sources[p] = Source(_public(uri, p), file_system, p, version, info.get("size"), limits)
        if uri.startswith(WEB):
            limits.check_size(info.get("size"), sources[p].uri)
    bucket = path.partition("/")[0]
    is_empty = not any(source.is_readable for source in sources.values())
    if is_empty and uri.startswith("s3://") and not file_system.exists(bucket):
        raise UserError(
            f"ingest.data_uri {uri}: there is no bucket {bucket!r} at "
            f"{os.environ.get('AWS_S3_ENDPOINT') or 'S3'}, or this key may not see it"
        )
    return _usable(uri, list(sources.values()), is_folder)


def _name_or_pattern(file_system: Any, path: str, uri: str) -> tuple[str, bool]:
    """The path and whether it is a name: what exists wins over a pattern and over ``%20``."""
    has_magic = any(mark in path for mark in MAGIC)
    if not has_magic and "%" not in path:
        return path, True
    if with_retries(lambda: file_system.exists(path), uri):
        return path, True
    if not has_magic and with_retries(lambda: file_system.exists(unquote(path)), uri):
        return unquote(path), True
    return path, not has_magic


def _found_here(uri: str) -> list[Source]:
    target = str(package_path(uri)) if uri.startswith("package://") else local_name(uri)
    file_system = fsspec.filesystem("file")
    sources = []
    for path, skipped in local_files(os.path.abspath(target)):
        version, size = "", None
        if not skipped:
            with contextlib.suppress(OSError):  # gone meanwhile; reading it says so
                version, size = _version(file_system.info(path))
        sources.append(
            Source(
                _public(uri, path),
                file_system,
                path,
                _listed(version, size),
                size,
                skipped=skipped,
            )
        )
    return sources


def _usable(uri: str, sources: list[Source], is_folder: bool) -> list[Source]:
    """The sources, if there is something to read among them and no file of an unknown kind was
    named itself."""
    unread = [source for source in sources if not source.is_readable]
    unknown = [source for source in unread if not source.skipped]
    if unknown and not is_folder:
        raise UserError(f"{unknown[0].uri}: unknown kind of file; accepted are {accepted()}")
    if len(unread) == len(sources):
        raise UserError(
            f"ingest.data_uri {uri}: no file found{_what_instead(unread)}; "
            f"accepted are {accepted()}"
        )
    return sources


def _what_instead(unread: list[Source]) -> str:
    reasons = collections.Counter(source.unread for source in unread)
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f" (only {told})" if told else ""


def _listed(name: str, size: int | None) -> str:
    return f"{name} {size}" if name else ""


def _public(uri: str, path: str) -> str:
    """A name for a file that is the same on every machine, without what may be a secret."""
    if uri.startswith("package://"):
        fixed = uri.removeprefix("package://").split("/")
        inside = package_path("package://" + fixed[0])
        return f"package://{fixed[0]}/{os.path.relpath(path, inside)}"
    if "://" not in uri or uri.startswith("file://"):
        return f"file://{path}"
    if uri.startswith("http"):
        parts = urlsplit(path)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return f"{uri.split('://', 1)[0]}://{path.split('://', 1)[-1]}"
