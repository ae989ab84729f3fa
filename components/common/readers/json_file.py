"""JSON files: an array of objects or texts, one object, an export that contains one list, or one of
chats (`chat_exports`).

A file of more than `RECORD_BYTES` is read item by item (`large_json`).
"""

import codecs
import itertools
import json
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.chat.forms import holds_conversation
from nudge.components.common.readers.chat_exports import SIDE_FILES, exported, exported_rows
from nudge.components.common.readers.encodings import utf8_stream
from nudge.components.common.readers.large_json import items
from nudge.components.common.readers.parquet import is_metadata
from nudge.components.common.readers.plain import read_text
from nudge.components.common.readers.records import (
    ReadOptions,
    Record,
    Records,
    copied,
    record_of,
    seekable,
)
from nudge.components.common.readers.unreadable import Unreadable


def read_json(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """One document per object with the text column, or per text of an array."""
    short = PurePosixPath(name).name
    if is_metadata(name):
        yield Record(short, Unreadable("metadata"))
        return
    stream = seekable(stream)
    start = stream.tell()
    text, encoding = read_text(stream, options)
    if isinstance(text, Unreadable):
        if text.reason == "too_long":
            stream.seek(start)
            yield from _large(stream, short, options)
            return
        yield Record(short, text)
        return
    size = len(text.encode())
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # JSON lines in a .json file
            yield from _lines(text, options)
            return
        yield Record(short, Unreadable("bad_record", str(error)[:200], size))
        return
    chats = exported(value, options)
    if chats is not None:
        yield from (record._replace(encoding=encoding) for record in chats)
        return
    rows = _rows(value, options)
    if short in SIDE_FILES and not _has_document(rows, options):
        rows = Unreadable("metadata")
    if isinstance(rows, Unreadable):
        yield Record(short, Unreadable(rows.reason, rows.detail, size))
        return
    for number, row in enumerate(rows, 1):
        yield _record(row, number, options)._replace(encoding=encoding)


def _large(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    plain, encoding = utf8_stream(stream, options)
    start = plain.read(len(codecs.BOM_UTF8))
    if start == codecs.BOM_UTF8 or not plain.seekable():  # the beginning is read twice
        plain = copied(plain, b"" if start == codecs.BOM_UTF8 else start)
    plain.seek(0)
    found = items(plain, options)
    first = next(found, None)
    chats = exported_rows(itertools.chain([first], found), options)
    if chats is not None:
        yield from (record._replace(encoding=encoding) for record in chats)
        return
    rows = found if first is None else itertools.chain([first], found)
    for number, item in enumerate(rows, 1):
        if isinstance(item, Unreadable):
            yield Record(name, item)
        else:
            yield _record(item, number, options)._replace(encoding=encoding)


def _lines(text: str, options: ReadOptions) -> Records:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield _record(row, number, options)


def _record(row: Any, number: int, options: ReadOptions) -> Record:
    if isinstance(row, str):
        return Record(str(number), row)
    if isinstance(row, dict):
        return record_of(row, number, options)
    size = len(json.dumps(row).encode())
    return Record(str(number), Unreadable("bad_record", f"item {number}", size))


def _fits(row: dict[str, Any], options: ReadOptions) -> bool:
    """Whether an object is one document."""
    return options.text_column in row or (options.format != "text" and holds_conversation(row))


def _has_document(rows: Any, options: ReadOptions) -> bool:
    listed = rows if isinstance(rows, list) else []
    return any(isinstance(row, str) or (isinstance(row, dict) and _fits(row, options))
               for row in listed)  # fmt: skip


def _rows(value: Any, options: ReadOptions) -> list[Any] | Unreadable:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if _fits(value, options):
            return [value]
        lists = [each for each in value.values() if isinstance(each, list)]
        fitting = [
            each
            for each in lists
            if any(isinstance(row, dict) and _fits(row, options) for row in each)
        ]
        if len(fitting) == 1:
            return fitting[0]
        # An object of objects, keyed by id.
        inner = [each for each in value.values() if isinstance(each, dict)]
        if inner and len(inner) == len(value) and _fits(inner[0], options):
            return [{options.id_column: key, **row} for key, row in value.items()]
        columns = lists[0][0] if len(lists) == 1 and lists[0] else value
        names = columns if isinstance(columns, dict) else value
        return Unreadable("no_column", ", ".join(map(str, list(names)[:20])))
    return Unreadable("bad_record", f"a JSON {type(value).__name__}")
