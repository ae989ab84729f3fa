"""Finds the sources that ``data_uri`` names: local files, objects in stores, web addresses."""

import collections
import contextlib
import dataclasses
import itertools
import os
import posixpath
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.uris import is_local, package_path
from nudge.components.common.readers import accepted, hidden_part, reason_unread
from nudge.components.ingest.downloads import WebLimits
from nudge.components.ingest.listing import MAGIC, local_files, local_name, named_uris
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.sources import Source, listed_version, version_of
from nudge.components.ingest.stores import WEB, Vanished, file_system_of, why, with_retries

SCHEMES = ("package", "file", "s3", "hf", "https", "http", "gs", "gcs", "az", "abfs", "abfss")
"""fsspec's chained and code-running schemes are deliberately missing."""


def find_sources(data_uri: str | Sequence[str], limits: WebLimits | None = None) -> list[Source]:
    """Every file that the URIs name, in a fixed order, with folders and globs expanded.

    `listing.named_uris` describes ``data_uri``. Hidden and special files are listed with the reason
    why they are not read.

    URLs that differ only in their query, which may be a secret and is not stored, are numbered; the
    next run reads them afresh. Raises `UserError` if a URI names nothing, or directly names a file
    of an unknown kind; inside a folder, such files are listed as sources.
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
    numbered: list[Source] = []
    for _, group in itertools.groupby(ordered, lambda source: source.uri):
        first, *others = group
        if others:
            first = dataclasses.replace(first, listed="")
        numbered.append(first)
        for number, other in enumerate(others, 2):
            numbered.append(dataclasses.replace(other, uri=f"{other.uri} ({number})", listed=""))
    return numbered


def sources_of(settings: IngestSettings, limits: WebLimits) -> list[Source]:
    """The sources of a recipe, also those of a mix; raises `UserError` as `find_sources` does, and
    if two parts of a mix share a file."""
    if not settings.mix:
        return find_sources(settings.data_uri, limits)
    found: dict[str, Source] = {}
    for part in settings.mix:
        for source in find_sources(part.data_uri, limits):
            other = found.setdefault(source.uri, dataclasses.replace(source, part=part.name))
            if other.part != part.name:
                raise UserError(
                    f"ingest.mix: {source.uri} is in {other.part} and in {part.name}; a file can "
                    "have only one share"
                )
    return [found[uri] for uri in sorted(found)]


def _check_scheme(uri: str) -> None:
    scheme, separator, _ = uri.partition("://")
    try:
        urlsplit(uri)
    except ValueError as error:
        raise UserError(f"ingest.data_uri {uri}: this is not an address: {error}") from None
    is_chained = "::" in uri.partition("?")[0] and not is_local(uri)
    if (separator and scheme.lower() not in SCHEMES) or is_chained:
        raise UserError(
            f"ingest.data_uri {uri}: this scheme is not supported; accepted are a path and "
            f"{', '.join(f'{each}://' for each in SCHEMES)}"
        )


def _is_remote_name(uri: str) -> bool:
    """Whether a text with blanks is the name of a single object or folder in a store."""
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
        if not found and not os.path.lexists(target) and not any(mark in target for mark in MAGIC):
            raise UserError(f"ingest.data_uri {uri}: there is no such file or folder here")
        return _usable(uri, found, os.path.isdir(target))
    file_system, path = file_system_of(uri, "ingest.data_uri", limits)
    if uri.startswith(WEB) and "*" not in uri and not reason_unread(urlsplit(uri).path):
        source = Source(_public(uri, path), file_system, path, limits=limits)
        try:
            name, size = source.version()
            limits.check_size(size, source.uri)
            return [dataclasses.replace(source, listed=listed_version(name, size), bytes=size)]
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
    except (ValueError, NotImplementedError) as error:  # such as hf:// without a name
        raise UserError(f"ingest.data_uri {uri}: cannot be listed: {why(error)}") from None
    # Some stores list a folder as a file too; its name ends in a slash.
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
            # A hidden folder counts once, however many objects are in it.
            end = p.index(f"/{hidden}", len(root)) + 1 + len(hidden)
            p, info = p[:end], {}
            sources[p] = Source(_public(uri, p), file_system, p, skipped="hidden")
            continue
        version = listed_version(*version_of(info))
        sources[p] = Source(_public(uri, p), file_system, p, version, info.get("size"), limits)
        if uri.startswith(WEB):
            limits.check_size(info.get("size"), sources[p].uri)
    bucket = path.partition("/")[0]
    is_empty = not any(source.is_readable for source in sources.values())
    if is_empty and uri.startswith("s3://") and not file_system.exists(bucket):
        raise UserError(
            f"ingest.data_uri {uri}: there is no bucket {bucket!r} at "
            f"{os.environ.get('AWS_S3_ENDPOINT') or 'S3'}, or this key has no access to it"
        )
    return _usable(uri, list(sources.values()), is_folder)


def _name_or_pattern(file_system: Any, path: str, uri: str) -> tuple[str, bool]:
    """The path and whether it is a name: an existing name wins over a pattern and over ``%20``."""
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
            with contextlib.suppress(OSError):  # deleted in the meantime; reading reports it
                version, size = version_of(file_system.info(path))
        sources.append(
            Source(
                _public(uri, path),
                file_system,
                path,
                listed_version(version, size),
                size,
                skipped=skipped,
            )
        )
    return sources


def _usable(uri: str, sources: list[Source], is_folder: bool) -> list[Source]:
    """The sources; raises `UserError` if none can be read, or if a file of an unknown kind is named
    directly."""
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
    found = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f" (only {found})" if found else ""


def _public(uri: str, path: str) -> str:
    """A name for a file that is the same on every machine, without parts that may be secret."""
    if uri.startswith("package://"):
        fixed = uri.removeprefix("package://").split("/")
        inside = package_path("package://" + fixed[0])
        return f"package://{fixed[0]}/{os.path.relpath(path, inside)}"
    if "://" not in uri or uri.startswith("file://"):
        # A name need not be UTF-8: one that is windows-1252 becomes caf\\xe9.txt here.
        return f"file://{os.fsencode(path).decode('utf-8', 'backslashreplace')}"
    if uri.startswith("http"):
        parts = urlsplit(path)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return f"{uri.split('://', 1)[0]}://{path.split('://', 1)[-1]}"
