"""Zip archives: every member with a reader is read in place and never unpacked to disk."""

import re
import zipfile
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import IO

from nudge.components.common.core.errors import UserError
from nudge.components.common.readers import records
from nudge.components.common.readers.names import hidden_part, suffix_of
from nudge.components.common.readers.records import (
    DAMAGED_ARCHIVE,
    Reader,
    ReadOptions,
    Record,
    Records,
    seekable,
)
from nudge.components.common.readers.unreadable import Unreadable


def read_zip(
    stream: IO[bytes],
    name: str,
    options: ReadOptions,
    *,
    reason_unread: Callable[[str], str],
    read: Reader,
) -> Records:
    """The documents of every member, read with ``read``; ``reason_unread`` is why a name has no
    reader, or empty."""
    try:
        yield from _members(stream, options, reason_unread, read)
    except UserError:  # a ValueError too, but it means that the store failed, not the file
        raise
    except DAMAGED_ARCHIVE as error:
        yield Record(name, Unreadable("damaged", str(error)))


def _members(
    stream: IO[bytes], options: ReadOptions, reason_unread: Callable[[str], str], read: Reader
) -> Records:
    with zipfile.ZipFile(seekable(stream)) as archive:
        for member in archive.infolist():
            inner = member.filename
            if inner.endswith("/"):
                continue
            if PurePosixPath(inner).is_absolute() or ".." in re.split(r"[/\\]", inner):
                yield Record(inner, Unreadable("unsafe_path"))
            elif member.flag_bits & 1:
                yield Record(inner, Unreadable("encrypted"))
            elif hidden_part(inner):
                yield Record(inner, Unreadable("hidden"))
            elif suffix_of(inner) == ".zip":
                yield Record(inner, Unreadable("unknown_kind", bytes=member.file_size))
            elif reason := reason_unread(inner):
                yield Record(inner, Unreadable(reason, bytes=member.file_size))
            elif is_bomb(member):
                yield Record(inner, Unreadable("decompression_bomb"))
            else:
                try:
                    with archive.open(member) as file:
                        for record in read(file, inner, options):
                            is_file = record.name in (inner, PurePosixPath(inner).name)
                            name = inner if is_file else f"{inner}:{record.name}"
                            yield record._replace(name=name)
                except (NotImplementedError, zipfile.BadZipFile) as error:
                    yield Record(inner, Unreadable("damaged", str(error)))


def is_bomb(member: zipfile.ZipInfo) -> bool:
    """Whether a member's stated size is out of all proportion to its compressed size."""
    return member.file_size > max(records.BOMB_BYTES, records.BOMB_RATIO * member.compress_size)
