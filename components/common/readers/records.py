"""What readers yield, and the limits they obey.

A reader takes a binary stream and yields one `Record` per document. An `Unreadable` represents a
document that exists but cannot be read, so that it is counted under a reason. No reader keeps more
than one record of `RECORD_BYTES` in memory, and none trusts a size that a file states.
"""

import io
import json
import lzma
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple

from nudge.components.common.artifacts.corpus import zstd
from nudge.components.common.chat import lengths
from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.chat.forms import chat_columns, conversation_of, is_conversation
from nudge.components.common.chat.refusals import Refusal
from nudge.components.common.readers.guarded import guarded
from nudge.components.common.readers.unreadable import Unreadable

RECORD_BYTES = 64 << 20
"""A longer line or file is counted as too_long and never loaded completely."""
BOMB_RATIO, BOMB_BYTES = 250, 256 << 20
"""Output that exceeds both limits, relative to the input and in total, is a decompression bomb."""
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError, zipfile.BadZipFile)
"""What a damaged stream raises; an object store that does not answer raises `UserError`."""
DAMAGED_ARCHIVE = (ValueError, IndexError, NotImplementedError, RuntimeError, struct.error)
"""What zipfile raises besides BadZipFile on a nonsensical index; found by fuzzing."""


@dataclass(frozen=True)
class Page:
    """A file whose text is expensive to extract; `text` runs in a worker that can be killed."""

    raw: bytes
    finder: Callable[[bytes], str | Unreadable]
    needs: tuple[str, ...] = ()
    """The libraries that ``finder`` imports."""

    def text(self) -> str | Unreadable:
        """The extracted text, or why there is none."""
        found: str | Unreadable = guarded(self.finder, self.raw, needs=self.needs)
        return found


class Record(NamedTuple):
    """One document as it was read; ``name`` is unique in its file if the file's ids are.

    ``encoding`` is set if the text was not UTF-8.
    """

    name: str
    text: str | Unreadable | Page | Conversation
    license: str = ""
    origin: str = ""
    encoding: str = ""


class Bomb(Exception):
    """A stream expands out of all proportion to its input."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read files; the defaults are those of the step `ingest`."""

    text_column: str = "text"
    id_column: str = "id"
    license_column: str = ""
    source_column: str = ""
    encoding: str = ""
    """The encoding of text files; empty: UTF-8, else declared or detected."""
    delimiter: str = ""
    """The delimiter of .csv files; empty: detected from the header."""
    keep_front_matter: bool = False
    """Whether YAML front matter stays in Markdown texts."""
    format: Literal["auto", "text", "chat"] = "text"
    """Whether a row is a text, a conversation, or the text if it has one, else a conversation."""
    assistant_name: str = ""
    """The author who is the assistant in an export of a chat between people."""

    def columns_of(self, names: Iterable[str]) -> list[str]:
        """Those of a table's columns that are read."""
        names = list(names)
        wanted = {self.text_column, self.id_column, self.license_column, self.source_column}
        if self.may_be_chat(names):
            wanted |= set(chat_columns(names))
        return [name for name in names if name in wanted]

    def header(self, names: Iterable[str]) -> list[str]:
        """A table's columns; one such as ``Text`` is the text column if none has its exact name."""
        found = [name.strip() for name in names]
        like = [each for each in found if each.casefold() == self.text_column.casefold()]
        if self.text_column in found or len(like) != 1:
            return found
        return [self.text_column if each == like[0] else each for each in found]

    def may_be_chat(self, names: Iterable[Any]) -> bool:
        """Whether a row with these columns may be a conversation."""
        return self.format != "text" and is_conversation(names)

    def has_body(self, names: Iterable[Any]) -> bool:
        """Whether a row with these columns is a text or a conversation."""
        names = list(names)
        return self.text_column in names or self.may_be_chat(names)


Records = Iterator[Record]
Reader = Callable[[IO[bytes], str, ReadOptions], Records]


def whole(stream: IO[bytes]) -> bytes | Unreadable:
    """All bytes of a stream, at most `RECORD_BYTES`."""
    raw = stream.read(RECORD_BYTES + 1)
    if len(raw) <= RECORD_BYTES:
        return raw
    size, more = len(raw), raw
    while more := stream.read(1 << 20):
        size += len(more)
    return Unreadable("too_long", bytes=size)


def lines(stream: IO[bytes]) -> Iterator[bytes | Unreadable]:
    """The lines of a stream with their ends; one over `RECORD_BYTES` is skipped and counted."""
    while line := stream.readline(RECORD_BYTES + 1):
        if len(line) <= RECORD_BYTES:
            yield line
            continue
        size = len(line)
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
            size += len(line)
        yield Unreadable("too_long", bytes=size)


def seekable(stream: IO[bytes]) -> IO[bytes]:
    """The stream itself, or a temporary copy of one that cannot seek cheaply."""
    if not isinstance(stream, zipfile.ZipExtFile) and stream.seekable():
        return io.BufferedReader(stream) if isinstance(stream, io.RawIOBase) else stream
    return copied(stream)


def copied(stream: IO[bytes], start: bytes = b"") -> IO[bytes]:
    """A temporary copy on disk of ``start`` and what is left of a stream."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    copy.write(start)
    shutil.copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return copy


def record_of(row: dict[Any, Any], number: int, options: ReadOptions) -> Record:
    """The record of one row of a table, named by its id or else by its ``number``."""
    text = row.get(options.text_column)
    if options.format == "chat" or (not text and options.may_be_chat(row)):
        text = _conversation(row)
    elif options.text_column not in row:
        text = Unreadable("no_column", ", ".join(map(str, row)))
    elif isinstance(text, bytes):  # a Parquet column of type binary
        try:
            text = text.decode()
        except UnicodeDecodeError:
            text = Unreadable("not_utf8", bytes=len(text))
    elif not isinstance(text, str | Unreadable | Conversation):
        text = Unreadable("no_text")
    size = characters(text)
    if size > RECORD_BYTES:
        text = Unreadable("too_long", bytes=size)
    return Record(
        _plain_value(row, options.id_column) or str(number),
        text,
        _plain_value(row, options.license_column),
        _plain_value(row, options.source_column),
    )


def _conversation(row: dict[Any, Any]) -> Conversation | Unreadable:
    try:
        return conversation_of(row)
    except Refusal as refusal:
        size = len(json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "replace"))
        return Unreadable(refusal.reason, refusal.detail, size)


def characters(text: Any) -> int:
    """The length of a text or conversation; 0 for what is not read yet."""
    if isinstance(text, Conversation):
        return lengths.characters(text)
    return len(text) if isinstance(text, str) else 0


def _plain_value(row: dict[Any, Any], column: str) -> str:
    value = row.get(column) if column else None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return "" if value is None or isinstance(value, Unreadable) else str(value)
