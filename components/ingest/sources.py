"""Where text comes from: files behind URIs, opened by fsspec, read by their suffix."""

import ast
import csv
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
from nudge.components.common.errors import UserError
from nudge.components.common.uris import package_path
from nudge.components.ingest.settings import IngestSettings

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Undecodable:
    """A record that is there but cannot be read; counted under ``reason`` and left out."""

    reason: str


@dataclass(frozen=True)
class Source:
    """One file: its public name, and how it is opened."""

    uri: str
    file_system: Any
    path: str

    @property
    def suffix(self) -> str:
        """The suffix that tells the format, without that of the compression."""
        name = PurePosixPath(self.path)
        return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix

    def open(self) -> IO[bytes]:
        compression = COMPRESSED.get(PurePosixPath(self.path).suffix)
        file = fsspec.core.OpenFile(
            self.file_system, self.path, mode="rb", compression=compression
        ).open()
        return file  # type: ignore[no-any-return]

    def size(self) -> int:
        """Bytes as stored, before any decompression."""
        return int(self.file_system.size(self.path) or 0)


def find_sources(data_uri: str) -> list[Source]:
    """Every file that the URIs name, in a fixed order, folders and globs expanded.

    Raises `UserError` if a URI names nothing or a file is of an unknown kind.
    """
    found = {source.uri: source for uri in data_uri.split() for source in _expand(uri)}
    if not found:
        raise UserError("ingest.data_uri names no source; give a file, a folder or a glob")
    return [found[uri] for uri in sorted(found)]


def read_records(source: Source, settings: IngestSettings) -> "Records":
    """The (name, text) of every document of a file; `Undecodable` stands for an unreadable text."""
    yield from READERS[source.suffix](source, settings)


def s3_options() -> dict[str, Any]:
    """fsspec's options for a data connection, from the AWS_* variables."""
    endpoint = os.environ.get("AWS_S3_ENDPOINT")
    return {
        "key": os.environ.get("AWS_ACCESS_KEY_ID"),
        "secret": os.environ.get("AWS_SECRET_ACCESS_KEY"),
        "client_kwargs": {
            "endpoint_url": endpoint,
            "region_name": os.environ.get("AWS_DEFAULT_REGION"),
        },
        "config_kwargs": {
            "s3": {"addressing_style": "path"} if endpoint else {},
            "retries": {"max_attempts": 8, "mode": "standard"},
        },
    }


def _expand(uri: str) -> list[Source]:
    target = str(package_path(uri)) if uri.startswith("package://") else uri
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    options = s3_options() if scheme == "s3" else {}
    try:
        file_system, path = fsspec.core.url_to_fs(target, **options)
        is_folder = not any(mark in path for mark in "*?[") and file_system.isdir(path)
        pattern = posixpath.join(path, "**") if is_folder else path
        # Some stores list a folder as a file of its own name; those end in a slash.
        paths = sorted(p for p in file_system.glob(pattern) if not file_system.isdir(p))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"ingest.data_uri {uri}: cannot be listed: {error}") from None
    if is_folder:
        paths = [p for p in paths if Source("", None, p).suffix in READERS]
    if not paths:
        raise UserError(f"ingest.data_uri {uri}: no file found; accepted are {accepted()}")
    sources = [Source(_public(uri, p), file_system, p) for p in paths]
    for source in sources:
        if source.suffix not in READERS:
            raise UserError(f"{source.uri}: unknown kind of file; accepted are {accepted()}")
    return sources


def _public(uri: str, path: str) -> str:
    """A name for a file that is the same on every machine: the URI's, as far as that goes."""
    if uri.startswith("package://"):
        fixed = uri.removeprefix("package://").split("/")
        inside = package_path("package://" + fixed[0])
        return f"package://{fixed[0]}/{os.path.relpath(path, inside)}"
    if "://" not in uri or uri.startswith("file://"):
        return f"file://{path}"
    return f"{uri.split('://', 1)[0]}://{path.split('://', 1)[-1]}"


def accepted() -> str:
    """The suffixes that are read, for messages."""
    return ", ".join(sorted(READERS)) + " (each also " + ", ".join(sorted(COMPRESSED)) + ")"


Records = Iterator[tuple[str, str | Undecodable]]


def _decode(raw: bytes) -> str | Undecodable:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Undecodable("not_utf8")


def _plain(source: Source, _: IngestSettings) -> Records:
    with source.open() as file:
        yield PurePosixPath(source.path).name, _decode(file.read())


def _html(source: Source, _: IngestSettings) -> Records:
    import trafilatura

    with source.open() as file:
        text = _decode(file.read())
    if isinstance(text, str):
        text = trafilatura.extract(text) or Undecodable("no_main_text")
    yield PurePosixPath(source.path).name, text


def _json_lines(source: Source, settings: IngestSettings) -> Records:
    with source.open() as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            line = _decode(raw)
            if not isinstance(line, str):
                yield str(number), line
                continue
            try:
                record = json.loads(line)
            except ValueError:
                yield str(number), Undecodable("bad_record")
                continue
            if not isinstance(record, dict):
                yield str(number), Undecodable("bad_record")
                continue
            _need_column(source, settings, list(record), number == 1)
            text = record.get(settings.text_column)
            name = str(record.get(settings.id_column, number))
            yield name, text if isinstance(text, str) else Undecodable("no_text")


def _csv(source: Source, settings: IngestSettings) -> Records:
    with source.open() as file:
        text = _decode(file.read())
    if not isinstance(text, str):
        yield "", text
        return
    rows = csv.DictReader(io.StringIO(text, newline=""))
    _need_column(source, settings, list(rows.fieldnames or []), True)
    for number, row in enumerate(rows, 1):
        value = row.get(settings.text_column)
        name = str(row.get(settings.id_column) or number)
        yield name, value if isinstance(value, str) else Undecodable("no_text")


def _parquet(source: Source, settings: IngestSettings) -> Records:
    import pyarrow.parquet

    with source.open() as file:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        _need_column(source, settings, names, True)
        columns = [name for name in (settings.text_column, settings.id_column) if name in names]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                text = row[settings.text_column]
                name = str(row.get(settings.id_column) or number)
                yield name, text if isinstance(text, str) else Undecodable("no_text")


def _python_literal(source: Source, _: IngestSettings) -> Records:
    """A Python module that is one mapping of names to texts; it is read, never executed."""
    with source.open() as file:
        text = _decode(file.read())
    if not isinstance(text, str):
        raise UserError(f"{source.uri}: a .py source must be UTF-8")
    try:
        nodes = [n.value for n in ast.parse(text).body if isinstance(n, ast.Assign | ast.Expr)]
        mappings = [ast.literal_eval(node) for node in nodes if isinstance(node, ast.Dict)]
    except (SyntaxError, ValueError, TypeError):
        mappings = []
    if len(mappings) != 1:
        raise UserError(f"{source.uri}: a .py source must hold one literal mapping of name to text")
    for name, value in mappings[0].items():
        yield str(name), value if isinstance(value, str) else Undecodable("no_text")


def _need_column(source: Source, settings: IngestSettings, columns: list[str], first: bool) -> None:
    if first and settings.text_column not in columns:
        raise UserError(
            f"{source.uri} has no column {settings.text_column!r}, it has: {', '.join(columns)}; "
            "set ingest.text_column"
        )


READERS: dict[str, Callable[[Source, IngestSettings], Records]] = {
    ".txt": _plain,
    ".md": _plain,
    ".html": _html,
    ".htm": _html,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
    ".py": _python_literal,
}
