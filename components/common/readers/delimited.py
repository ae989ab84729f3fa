"""Text tables: .csv with quoting, .tsv without; one document per row.

An unclosed quotation mark makes a CSV parser swallow row after row. Such a row is counted as
``unclosed_quote`` under its number, and reading resumes at the next line.
"""

import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator
from typing import IO

from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.readers.encodings import utf8_stream
from nudge.components.common.readers.records import (
    RECORD_BYTES,
    ReadOptions,
    Record,
    Records,
    lines,
    record_of,
)
from nudge.components.common.readers.unreadable import Unreadable

DELIMITERS = ",;\t|"
MOST_READ_AGAIN = 1 << 30
"""Limit on characters reread after broken rows, so that no file takes quadratic time."""
SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?[\r\n]*')
"""A first line that names the delimiter, as Excel reads and writes it."""
csv.field_size_limit(RECORD_BYTES)


def read_csv(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The rows of a table whose fields may be quoted."""
    stream, encoding = utf8_stream(stream, options)
    return _encoded(_Table(stream, name, options).records(), encoding)


def read_tsv(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The rows of a table with tabs; quotation marks are part of the text."""
    stream, encoding = utf8_stream(stream, options)
    return _encoded(_Table(stream, name, options, is_tsv=True).records(), encoding)


def _encoded(records: Records, encoding: str) -> Records:
    if not encoding:
        return records
    return (record._replace(encoding=encoding) for record in records)


def _text_of(record: Record) -> str:
    if isinstance(record.text, Conversation):
        return record.text.transcript()
    return record.text if isinstance(record.text, str) else ""


class _Table:
    """The rows of one file; an unclosed quotation mark never hides another row."""

    def __init__(
        self, stream: IO[bytes], name: str, options: ReadOptions, is_tsv: bool = False
    ) -> None:
        self._lines, self._name, self._options, self._is_tsv = lines(stream), name, options, is_tsv
        self._delimiter = "\t" if is_tsv else options.delimiter
        self._again: deque[str] = deque()
        """Lines that a broken row swallowed; they are reread."""
        self._taken: list[str] = []
        """The lines of the row that is being read."""
        self._broken: list[Unreadable] = []
        self._asked_after_end = False
        """Whether the parser asked for a line after the last one: a quotation mark is open."""
        self._line = self._read_again = 0

    def records(self) -> Records:
        self._parts = self._decoded()
        self._rows = self._reader()
        header = self._header()
        if isinstance(header, Unreadable):  # without a header there are no columns
            yield Record(self._name, header)
            return
        number = 0
        while (row := self._next(len(header))) is not None:
            if not row and not self._broken:
                continue
            number += 1
            if isinstance(row, Unreadable):
                self._broken.clear()
                where = f"row {number}"
                detail = f"{where}: {row.detail}" if row.detail else where
                yield Record(str(number), Unreadable(row.reason, detail, row.bytes))
                continue
            record = record_of(dict(itertools.zip_longest(header, row)), number, self._options)
            if self._broken:  # a line of this row was left out
                record = record._replace(text=self._broken.pop())
                self._broken.clear()
            elif re.search("[\udc80-\udcff]", text := _text_of(record)):
                size = len(text.encode("utf-8", "surrogateescape"))
                record = record._replace(text=Unreadable("not_utf8", bytes=size))
            yield record
        for lost in self._broken:
            number += 1
            yield Record(str(number), lost)

    def _header(self) -> list[str] | Unreadable:
        row = self._next(None)
        while row is not None and not row and not self._broken:
            row = self._next(None)
        if self._broken:
            return self._broken.pop()
        return self._options.header(row) if isinstance(row, list) else row or []

    def _next(self, width: int | None) -> list[str] | Unreadable | None:
        """The next row, None at the end; ``width`` is the number of columns if it is known."""
        self._taken = []
        try:
            row = next(self._rows)
        except StopIteration:
            return None
        except csv.Error as error:
            if len(self._taken) > 1:
                return self._unclosed()
            return Unreadable("bad_record", str(error))
        if self._broken or (len(self._taken) == 1 and not self._asked_after_end):
            return row
        return row if self._closes(row, width) else self._unclosed()

    def _unclosed(self) -> Unreadable:
        """Count a row's first line as lost; the other lines may be rows of their own."""
        first, *others = self._taken
        line = self._line - len(others)
        where = f"the quotation mark in line {line} is never closed"
        self._read_again += sum(map(len, others))
        if self._read_again > MOST_READ_AGAIN:
            size = sum(len(each.encode("utf-8", "surrogateescape")) for each in self._taken)
            return Unreadable("unclosed_quote", f"{where}, and {len(others)} lines after it", size)
        self._again.extendleft(reversed(others))
        self._line = line
        self._rows = self._reader()
        size = len(first.encode("utf-8", "surrogateescape"))
        return Unreadable("unclosed_quote", where, size)

    def _closes(self, row: list[str], width: int | None) -> bool:
        """Whether several lines form one row: each quotation mark closes at the end of a field, and
        there are no more fields than columns."""
        if self._asked_after_end:
            return False
        try:
            strict = list(
                csv.reader(iter(self._taken), delimiter=self._delimiter or ",", strict=True)
            )
        except csv.Error:
            return False
        return len(strict) == 1 and (width is None or len(row) <= width)

    def _reader(self) -> Iterator[list[str]]:
        if not self._delimiter:
            source = self._source()
            first = next(source, "")
            while first and not first.strip() and not self._broken:
                first = next(source, "")
            if given := SEPARATOR_LINE.fullmatch(first):
                self._delimiter, first = given[1], ""
            else:
                self._delimiter = self._detected(first)
            if first:
                self._again.append(first)
                self._line -= 1
        if self._is_tsv:
            return csv.reader(self._source(), delimiter="\t", quoting=csv.QUOTE_NONE)
        return csv.reader(self._source(), delimiter=self._delimiter)

    def _detected(self, header: str) -> str:
        """The delimiter that makes the header contain the text column, else a comma."""
        for delimiter in DELIMITERS:
            try:
                names = next(csv.reader([header], delimiter=delimiter), [])
            except csv.Error:
                continue
            if self._options.has_body(self._options.header(names)):
                return delimiter
        return ","

    def _source(self) -> Iterator[str]:
        self._asked_after_end = False
        while True:
            if self._again:
                line = self._again.popleft()
            else:
                following = next(self._parts, None)
                if following is None:
                    self._asked_after_end = True
                    return
                line = following
            self._line += 1
            self._taken.append(line)
            yield line

    def _decoded(self) -> Iterator[str]:
        for line in self._lines:
            if isinstance(line, Unreadable):
                self._broken.append(line)
                yield "\n"
                continue
            for part in line.splitlines(keepends=True):  # a bare \r ends a line too
                yield part.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
