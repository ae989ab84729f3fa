"""The reader for each file suffix; packages can add readers through an entry point.

A package adds a reader with an entry point of the group ``nudge.readers``. Its name is a suffix
such as ``.log``; its value is a `Reader`: a function of a binary stream, the file's name and the
`ReadOptions` that yields `Record` values.
"""

import functools
import io
from importlib.metadata import entry_points
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.readers import records
from nudge.components.common.readers.archive import read_zip
from nudge.components.common.readers.delimited import read_csv, read_tsv
from nudge.components.common.readers.epub import read_epub
from nudge.components.common.readers.evernote import read_enex
from nudge.components.common.readers.json_file import read_json
from nudge.components.common.readers.json_lines import read_json_lines
from nudge.components.common.readers.mail import read_eml, read_mbox, read_msg
from nudge.components.common.readers.names import COMPRESSED, NOT_TEXT, suffix_of
from nudge.components.common.readers.notebook import read_canvas, read_notebook
from nudge.components.common.readers.office import read_docx, read_odt, read_pptx, read_rtf
from nudge.components.common.readers.parquet import read_arrow, read_parquet
from nudge.components.common.readers.pdf import read_pdf
from nudge.components.common.readers.plain import read_markdown, read_plain
from nudge.components.common.readers.records import (
    DAMAGE,
    Bomb,
    Reader,
    ReadOptions,
    Record,
    Records,
)
from nudge.components.common.readers.source_code import SUFFIXES, read_python, read_source
from nudge.components.common.readers.spreadsheet import read_sheets, read_xlsx
from nudge.components.common.readers.unreadable import Unreadable
from nudge.components.common.readers.web import read_html
from nudge.components.common.readers.wiki import read_wiki

GROUP = "nudge.readers"


def read_archive(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The documents of every member of a .zip file."""
    return read_zip(stream, name, options, reason_unread=reason_unread, read=read_stream)


READERS: dict[str, Reader] = {
    ".txt": read_plain,
    ".text": read_plain,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".mdx": read_markdown,
    ".rst": read_plain,
    ".adoc": read_plain,
    ".asciidoc": read_plain,
    ".org": read_plain,
    ".srt": read_plain,
    ".vtt": read_plain,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".canvas": read_canvas,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".docx": read_docx,
    ".pptx": read_pptx,
    ".xlsx": read_xlsx,
    ".xlsm": read_xlsx,
    ".xls": read_sheets,
    ".xlsb": read_sheets,
    ".ods": read_sheets,
    ".odt": read_odt,
    ".odp": read_odt,
    ".rtf": read_rtf,
    ".epub": read_epub,
    ".ipynb": read_notebook,
    ".eml": read_eml,
    ".msg": read_msg,
    ".mbox": read_mbox,
    ".zip": read_archive,
    ".xml": read_wiki,
    ".enex": read_enex,
    ".py": read_python,
    **dict.fromkeys(SUFFIXES, read_source),
}


@functools.cache
def readers() -> dict[str, Reader]:
    """Every reader by its suffix, including those of installed packages.

    Raises `UserError` if the reader of a package cannot be loaded.
    """
    found = dict(READERS)
    for point in entry_points(group=GROUP):
        try:
            found[point.name.lower()] = point.load()
        except (ImportError, AttributeError) as error:
            package = point.dist.name if point.dist else "a package"
            raise UserError(
                f"{package} adds the reader {point.name} ({point.value}), which cannot be loaded: "
                f"{error}; fix it or uninstall it"
            ) from None
    return found


def accepted() -> str:
    """The accepted suffixes, for messages."""
    code = {*SUFFIXES, ".py"}
    names = sorted(suffix for suffix in readers() if suffix not in code)
    return f"{', '.join(names)}, source code (each also {', '.join(sorted(COMPRESSED))})"


def reason_unread(name: str) -> str:
    """Why a file with this name is not read; empty if there is a reader."""
    suffix = suffix_of(name)
    if suffix in readers():
        return ""
    return "not_text" if suffix in NOT_TEXT else "unknown_kind"


def read_stream(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """Every record of a stream; ``name`` decides the format. Damage becomes the last record."""
    opener = COMPRESSED.get(PurePosixPath(name).suffix.lower())
    try:
        if opener is not None:
            stream = io.BufferedReader(_Bounded(opener(stream), stream), 1 << 20)
        yield from readers()[suffix_of(name)](stream, name, options)
    except Bomb:
        yield Record(name, Unreadable("decompression_bomb"))
    except DAMAGE as error:
        yield Record(name, Unreadable("damaged", f"{type(error).__name__}: {error}"))


class _Bounded(io.RawIOBase):
    """A decompressed stream that raises `Bomb` if it grows out of all proportion to its input."""

    def __init__(self, inner: Any, compressed: IO[bytes]) -> None:
        self._inner, self._compressed, self._out = inner, compressed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read1(len(buffer))  # read() of a truncated stream loses data
        self._out += len(data)
        most = max(records.BOMB_BYTES, records.BOMB_RATIO * max(1, self._compressed.tell()))
        if self._out > most:
            raise Bomb
        buffer[: len(data)] = data
        return len(data)
