"""How a file becomes records, by its suffix; what cannot be read is counted, never fatal.

A reader takes a stream and yields a `Record` each; an `Unreadable` stands for a text that is there
and cannot be had. No reader holds more than one record of `RECORD_BYTES`, and none trusts a size.
"""

import ast
import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from nudge.components.common.corpus import zstd
from nudge.components.ingest.settings import IngestSettings

RECORD_BYTES = 64 << 20
"""A longer line or file is counted as too_long, and is never held in memory whole."""
BOMB_RATIO, BOMB_BYTES = 250, 256 << 20
"""More output than both, relative to what was read and in all, is a decompression bomb."""
DAMAGED_ARCHIVE = (ValueError, IndexError, NotImplementedError, RuntimeError, struct.error)
"""What zipfile raises beside BadZipFile on an index of nonsense; fuzzing found them."""
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError, zipfile.BadZipFile)
"""What a damaged stream raises; a store that does not answer raises no OSError (`sources`)."""
NO_VALUE = (ValueError, OverflowError, KeyError)
"""What pyarrow raises where Python has no such value: nanoseconds, the year 12000, a zone that
nobody knows, bytes that are no UTF-8."""
csv.field_size_limit(RECORD_BYTES)


@dataclass(frozen=True)
class Unreadable:
    """A record that is there but cannot be read; counted under ``reason`` and left out."""

    reason: str
    detail: str = ""
    bytes: int = 0
    """The bytes that stand there, where that is known."""


@dataclass(frozen=True)
class Page:
    """A file whose text has yet to be found in it; that takes long, so `cleaning` shares it out."""

    raw: bytes
    finder: Callable[[bytes], str | Unreadable]

    def text(self) -> str | Unreadable:
        """The page's text, or why there is none."""
        try:
            return self.finder(self.raw)
        except DAMAGE as error:
            return Unreadable("damaged", f"{type(error).__name__}: {error}", len(self.raw))


class Record(NamedTuple):
    """One document as it was read; ``name`` is unique in its file, if the file's own ids are."""

    name: str
    text: str | Unreadable | Page
    license: str = ""
    origin: str = ""


class Bomb(Exception):
    """A stream grows beyond what any text does."""


Records = Iterator[Record]
Reader = Callable[[IO[bytes], str, IngestSettings], Records]


class _Bounded(io.RawIOBase):
    """A decompressed stream that refuses to grow out of all proportion to what it was read from."""

    def __init__(self, inner: Any, compressed: IO[bytes]) -> None:
        self._inner, self._compressed, self._out = inner, compressed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read1(len(buffer))  # read() of a cut stream loses what it has
        self._out += len(data)
        if self._out > BOMB_BYTES and self._out > BOMB_RATIO * max(1, self._compressed.tell()):
            raise Bomb
        buffer[: len(data)] = data
        return len(data)


COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": zstd.ZstdFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


def suffix_of(name: str) -> str:
    """The suffix that tells the format, without that of the compression."""
    path = PurePosixPath(name)
    is_compressed = path.suffix.lower() in COMPRESSED
    return (PurePosixPath(path.stem).suffix if is_compressed else path.suffix).lower()


def read_stream(stream: IO[bytes], name: str, settings: IngestSettings) -> Records:
    """Every record of a stream whose format ``name`` tells; ends with what broke it, if so."""
    opener = COMPRESSED.get(PurePosixPath(name).suffix.lower())
    try:
        if opener is not None:
            stream = io.BufferedReader(_Bounded(opener(stream), stream), 1 << 20)
        yield from READERS[suffix_of(name)](stream, name, settings)
    except Bomb:
        yield Record(name, Unreadable("decompression_bomb"))
    except DAMAGE as error:
        yield Record(name, Unreadable("damaged", f"{type(error).__name__}: {error}"))


def _decode(raw: bytes) -> str | Unreadable:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Unreadable("not_utf8", bytes=len(raw))


def _whole(stream: IO[bytes]) -> bytes | Unreadable:
    raw = stream.read(RECORD_BYTES + 1)
    if len(raw) <= RECORD_BYTES:
        return raw
    size, more = len(raw), raw
    while more := stream.read(1 << 20):
        size += len(more)
    return Unreadable("too_long", bytes=size)


def _whole_text(stream: IO[bytes]) -> str | Unreadable:
    raw = _whole(stream)
    return raw if isinstance(raw, Unreadable) else _decode(raw)


def _plain(stream: IO[bytes], name: str, _: IngestSettings) -> Records:
    yield Record(PurePosixPath(name).name, _whole_text(stream))


def _page(finder: Callable[[bytes], str | Unreadable]) -> Reader:
    def read(stream: IO[bytes], name: str, _: IngestSettings) -> Records:
        raw = _whole(stream)
        text = raw if isinstance(raw, Unreadable) else Page(raw, finder)
        yield Record(PurePosixPath(name).name, text)

    return read


def _html(raw: bytes) -> str | Unreadable:
    import trafilatura

    text = _decode(raw)
    if isinstance(text, Unreadable):
        return text
    return trafilatura.extract(text) or Unreadable("no_main_text", bytes=len(raw))


def _pdf(raw: bytes) -> str | Unreadable:
    import pypdfium2

    try:
        with pypdfium2.PdfDocument(raw) as document:
            pages = [page.get_textpage().get_text_bounded() for page in document]
        return "\n\n".join(pages).strip() or Unreadable("no_main_text", bytes=len(raw))
    except pypdfium2.PdfiumError as error:
        return Unreadable("damaged", str(error), len(raw))


def _lines(stream: IO[bytes]) -> Iterator[bytes | Unreadable]:
    while line := stream.readline(RECORD_BYTES + 1):
        if len(line) <= RECORD_BYTES:
            yield line
            continue
        size = len(line)
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
            size += len(line)
        yield Unreadable("too_long", bytes=size)


def _json_lines(stream: IO[bytes], _: str, settings: IngestSettings) -> Records:
    for number, raw in enumerate(_lines(stream), 1):
        line = raw if isinstance(raw, Unreadable) else _decode(raw)
        if isinstance(line, Unreadable):
            yield Record(str(number), line)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a deep nesting is a RecursionError
            yield Record(str(number), Unreadable("bad_record", bytes=len(line.encode())))
            continue
        if not isinstance(record, dict):
            yield Record(str(number), Unreadable("bad_record", bytes=len(line.encode())))
            continue
        yield _record(record, number, settings)


def _table(delimiter: str) -> Reader:
    def read(stream: IO[bytes], name: str, settings: IngestSettings) -> Records:
        return _delimited(stream, name, settings, delimiter)

    return read


def _delimited(stream: IO[bytes], name: str, settings: IngestSettings, delimiter: str) -> Records:
    broken: list[Unreadable] = []

    def decoded() -> Iterator[str]:
        for line in _lines(stream):
            if isinstance(line, Unreadable):
                broken.append(line)
                yield "\n"
                continue
            for part in line.splitlines(keepends=True):  # a bare \r ends a line too
                yield part.decode("utf-8", "surrogateescape").removeprefix("\ufeff")

    rows = csv.reader(decoded(), delimiter=delimiter)
    header: list[str] = []
    try:
        header = next((row for row in rows if row or broken), [])
    except csv.Error as error:
        broken.append(Unreadable("bad_record", str(error)))
    if broken:  # without their names, the columns are none
        yield Record(name, broken.pop())
        return
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            number += 1
            broken.clear()
            yield Record(str(number), Unreadable("bad_record", str(error)))
            continue
        if not row and not broken:
            continue
        number += 1
        record = _record(dict(itertools.zip_longest(header, row)), number, settings)
        if broken:  # a line of this row was left out
            record = record._replace(text=broken.pop())
            broken.clear()
        elif isinstance(record.text, str) and re.search("[\udc80-\udcff]", record.text):
            size = len(record.text.encode("utf-8", "surrogateescape"))
            record = record._replace(text=Unreadable("not_utf8", bytes=size))
        yield record
    for lost in broken:
        number += 1
        yield Record(str(number), lost)


def _parquet(stream: IO[bytes], name: str, settings: IngestSettings) -> Records:
    import pyarrow
    import pyarrow.parquet

    with _seekable(stream) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        except (pyarrow.ArrowException, OSError) as error:
            yield Record(name, Unreadable("damaged", str(error)))
            return
        names = table.schema_arrow.names
        columns = [name for name in named_columns(settings) if name in names]
        number = 0
        for group in range(table.num_row_groups):
            left = table.metadata.row_group(group).num_rows
            if settings.text_column not in names:
                for absent in range(number + 1, number + left + 1):
                    yield Record(str(absent), Unreadable("no_column", ", ".join(names)))
                number += left
                continue
            try:
                batches = table.iter_batches(1024, row_groups=[group], columns=columns)
                for batch in batches:
                    for row in _rows(batch):
                        number, left = number + 1, left - 1
                        yield _record(row, number, settings)
            except (pyarrow.ArrowException, OSError) as error:
                for lost in range(number + 1, number + left + 1):
                    yield Record(str(lost), Unreadable("damaged", str(error)))
                number += left


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    rows = None
    if not any("[ns" in str(column.type) for column in batch.columns):
        with contextlib.suppress(*NO_VALUE):
            rows = batch.to_pylist()
    if rows is not None:
        yield from rows
        return
    for scalars in zip(*batch.columns, strict=True):
        yield dict(zip(batch.schema.names, map(_value, scalars), strict=True))


def _value(scalar: Any) -> Any:
    try:
        value = scalar.as_py()
        # Where pandas is installed its own type comes, which has room for them; a corpus does not
        # depend on that.
        if getattr(value, "nanosecond", 0) or getattr(value, "nanoseconds", 0):
            return Unreadable("bad_record", "a part of a microsecond")
        return value
    except UnicodeDecodeError:
        return Unreadable("not_utf8")
    except NO_VALUE as error:
        return Unreadable("bad_record", str(error))


def _seekable(stream: IO[bytes]) -> IO[bytes]:
    """The stream itself, or a temporary copy of one that cannot jump cheaply."""
    if not isinstance(stream, zipfile.ZipExtFile) and stream.seekable():
        return io.BufferedReader(stream) if isinstance(stream, io.RawIOBase) else stream
    copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    shutil.copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return copy


def _zip(stream: IO[bytes], name: str, settings: IngestSettings) -> Records:
    try:
        yield from _members(stream, settings)
    except DAMAGED_ARCHIVE as error:
        yield Record(name, Unreadable("damaged", str(error)))


def _members(stream: IO[bytes], settings: IngestSettings) -> Records:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            inner = member.filename
            if inner.endswith("/"):
                continue
            if PurePosixPath(inner).is_absolute() or ".." in re.split(r"[/\\]", inner):
                yield Record(inner, Unreadable("unsafe_path"))
            elif member.flag_bits & 1:
                yield Record(inner, Unreadable("encrypted"))
            elif suffix_of(inner) not in READERS or suffix_of(inner) == ".zip":
                yield Record(inner, Unreadable("unknown_kind"))
            elif member.file_size > max(BOMB_BYTES, BOMB_RATIO * member.compress_size):
                yield Record(inner, Unreadable("decompression_bomb"))
            else:
                try:
                    with archive.open(member) as file:
                        for record in read_stream(file, inner, settings):
                            whole = record.name in (inner, PurePosixPath(inner).name)
                            name = inner if whole else f"{inner}:{record.name}"
                            yield record._replace(name=name)
                except (NotImplementedError, zipfile.BadZipFile) as error:
                    yield Record(inner, Unreadable("damaged", str(error)))


def _python_literal(stream: IO[bytes], name: str, _: IngestSettings) -> Records:
    """A Python module that is one mapping of names to texts; it is read, never executed."""
    text = _whole_text(stream)
    if isinstance(text, Unreadable):
        yield Record(name, text)
        return
    try:
        nodes = [n.value for n in ast.parse(text).body if isinstance(n, ast.Assign | ast.Expr)]
        mappings = [ast.literal_eval(node) for node in nodes if isinstance(node, ast.Dict)]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        mappings = []
    if len(mappings) != 1:
        why = "not one literal mapping of name to text"
        yield Record(name, Unreadable("bad_record", why, len(text.encode())))
        return
    for key, value in mappings[0].items():
        yield Record(str(key), value if isinstance(value, str) else Unreadable("no_text"))


def named_columns(settings: IngestSettings) -> list[str]:
    """The columns that are read of a table."""
    named = (
        settings.text_column,
        settings.id_column,
        settings.license_column,
        settings.source_column,
    )
    return [name for name in named if name]


def _record(row: dict[str, Any], number: int, settings: IngestSettings) -> Record:
    text = row.get(settings.text_column)
    if settings.text_column not in row:
        text = Unreadable("no_column", ", ".join(map(str, row)))
    elif not isinstance(text, str | Unreadable):
        text = Unreadable("no_text")
    return Record(
        _plain_value(row, settings.id_column) or str(number),
        text,
        _plain_value(row, settings.license_column),
        _plain_value(row, settings.source_column),
    )


def _plain_value(row: dict[str, Any], column: str) -> str:
    value = row.get(column) if column else None
    return "" if value is None or isinstance(value, Unreadable) else str(value)


READERS: dict[str, Reader] = {
    ".txt": _plain,
    ".md": _plain,
    ".html": _page(_html),
    ".htm": _page(_html),
    ".pdf": _page(_pdf),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".zip": _zip,
    ".py": _python_literal,
}
