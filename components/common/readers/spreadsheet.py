"""Spreadsheets: .xlsx and .xlsm through openpyxl; .xls, .xlsb and .ods through calamine."""

import io
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.readers.guarded import guarded
from nudge.components.common.readers.office import ENCRYPTED, checked
from nudge.components.common.readers.records import (
    ReadOptions,
    Record,
    Records,
    record_of,
    whole,
)
from nudge.components.common.readers.unreadable import Unreadable


def read_xlsx(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """A workbook: one document per row of a sheet whose first row names the text column, and one
    per sheet otherwise."""
    yield from _workbook(checked(stream), name, options, xlsx_records, "openpyxl")


def read_sheets(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The same for a workbook of LibreOffice, or in one of Excel's binary formats."""
    raw = whole(stream)
    if isinstance(raw, bytes) and not raw.startswith(ENCRYPTED):  # a zip archive
        raw = checked(io.BytesIO(raw))
    yield from _workbook(raw, name, options, calamine_records, "python_calamine")


def _workbook(
    raw: bytes | Unreadable, name: str, options: ReadOptions, read: Any, library: str
) -> Records:
    sheets = raw
    if isinstance(raw, bytes):
        sheets = guarded(read, raw, options, needs=(library,))
    if isinstance(sheets, Unreadable):
        yield Record(PurePosixPath(name).name, sheets)
        return
    yield from sheets  # type: ignore[misc]


def xlsx_records(raw: bytes, options: ReadOptions) -> list[Record]:
    """The documents of a workbook of Excel 2007 or newer."""
    import openpyxl

    book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
    sheets = ((sheet.title, sheet.iter_rows(values_only=True)) for sheet in book.worksheets)
    return _records(sheets, options, raw)


def calamine_records(raw: bytes, options: ReadOptions) -> list[Record] | Unreadable:
    """The documents of a workbook in a format that calamine reads."""
    import python_calamine

    try:
        book = python_calamine.load_workbook(io.BytesIO(raw))
    except python_calamine.PasswordError:
        return Unreadable("encrypted", "it has a password", len(raw))
    sheets = ((name, _cells(book.get_sheet_by_name(name))) for name in book.sheet_names)
    return _records(sheets, options, raw)


def _cells(sheet: Any) -> Iterator[list[Any]]:
    """The rows, with None for an empty cell and without ``.0`` after whole numbers."""
    for row in sheet.to_python():
        cells = [None if cell == "" else cell for cell in row]
        yield [int(c) if isinstance(c, float) and c.is_integer() else c for c in cells]


def _records(
    sheets: Iterable[tuple[str, Iterable[Any]]], options: ReadOptions, raw: bytes
) -> list[Record]:
    found: list[Record] = []
    for title, every_row in sheets:
        rows = (row for row in every_row if any(value is not None for value in row))
        header = ["" if value is None else str(value) for value in next(rows, ())]
        columns = options.header(header)
        if options.has_body(columns):
            for number, row in enumerate(rows, 2):
                cells = zip(columns, row, strict=False)
                values = {name: cell if cell is None else str(cell) for name, cell in cells}
                record = record_of(values, number, options)
                found.append(record._replace(name=f"{title}:{record.name}"))
        elif header:
            lines = ["\t".join("" if v is None else str(v) for v in row).rstrip() for row in rows]
            found.append(Record(title, "\n".join(["\t".join(header), *lines])))
    return found or [Record("", Unreadable("no_text", bytes=len(raw)))]
