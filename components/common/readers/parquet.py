"""Parquet files and Arrow files (as Hugging Face datasets saves them): one document per row.

A dictionary page can repeat one long text in every row: a file of 357 bytes took 2.6 GB. So texts
stay dictionary-encoded while they are read, and the size that a file may expand to is bounded.
"""

import contextlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.readers.records import (
    BOMB_BYTES,
    BOMB_RATIO,
    Bomb,
    ReadOptions,
    Record,
    Records,
    characters,
    record_of,
    seekable,
)
from nudge.components.common.readers.unreadable import Unreadable

NO_VALUE = (ValueError, OverflowError, KeyError)
"""What pyarrow raises for values that Python cannot represent: nanoseconds, the year 12000, an
unknown time zone, bytes that are not UTF-8."""
BATCH_ROWS, NESTED_ROWS = 1024, 64
"""Rows that are decoded at once; fewer of nested columns, whose texts pyarrow repeats in memory."""


def read_parquet(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The rows of every row group; a damaged group is counted row by row."""
    import pyarrow
    import pyarrow.parquet

    with seekable(stream) as file:
        size = _size(file)
        try:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            schema = table.schema_arrow
            texts = [name for name in options.columns_of(schema.names) if _is_text(schema, name)]
            # Reopened, because only now is it known which columns are texts.
            table = pyarrow.parquet.ParquetFile(
                file, pre_buffer=False, buffer_size=1 << 20, read_dictionary=texts
            )
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            yield Record(name, Unreadable("damaged", str(error)))
            return
        names = schema.names
        columns = options.columns_of(names)
        nested = any(pyarrow.types.is_nested(schema.field(name).type) for name in columns)
        rows = NESTED_ROWS if nested else BATCH_ROWS
        number, budget = 0, _Budget(size)
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)
            left = facts.num_rows
            if not _is_readable(options, names):
                for absent in range(number + 1, number + left + 1):
                    yield Record(str(absent), Unreadable("no_column", ", ".join(names)))
                number += left
                continue
            # Not the sizes of its columns: asking a damaged group for one ends the process.
            if facts.total_byte_size > max(BOMB_BYTES, BOMB_RATIO * size):
                raise Bomb
            try:
                batches = table.iter_batches(rows, row_groups=[group], columns=columns)
                for batch in batches:
                    for row in _rows(batch):
                        number, left = number + 1, left - 1
                        yield budget.counted(record_of(row, number, options))
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                for lost in range(number + 1, number + left + 1):
                    yield Record(str(lost), Unreadable("damaged", str(error)))
                number += left


def read_arrow(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The rows of an Arrow IPC file or stream, batch by batch."""
    import pyarrow

    with seekable(stream) as file:
        size = _size(file)
        try:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            opener = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            opened = opener(file)
            batches = (
                (opened.get_batch(n) for n in range(opened.num_record_batches))
                if is_file
                else iter(opened)
            )
            number, budget = 0, _Budget(size)
            columns = options.columns_of(opened.schema.names)
            for batch in batches:
                batch.validate(full=True)  # damaged offsets would crash this process
                if not _is_readable(options, columns):
                    for _ in range(batch.num_rows):
                        number += 1
                        names = ", ".join(opened.schema.names)
                        yield Record(str(number), Unreadable("no_column", names))
                    continue
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    for row in _rows(batch.select(columns).slice(start, BATCH_ROWS)):
                        number += 1
                        yield budget.counted(record_of(row, number, options))
        except UserError:  # a ValueError too, but it means that the store failed, not the file
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            yield Record(name, Unreadable("damaged", str(error)))


def _is_readable(options: ReadOptions, names: list[str]) -> bool:
    return options.format == "chat" or options.has_body(names)


def is_metadata(name: str) -> bool:
    """Whether a file only describes a saved Hugging Face data set and has no documents."""
    return PurePosixPath(name).name in ("dataset_info.json", "state.json", "dataset_dict.json")


class _Budget:
    """Counts the text of a file of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self._size, self._characters = size, 0

    def counted(self, record: Record) -> Record:
        """The record itself; raises `Bomb` if the file expands out of all proportion."""
        self._characters += characters(record.text)
        if self._characters > max(BOMB_BYTES, BOMB_RATIO * self._size):
            raise Bomb
        return record


def _size(file: IO[bytes]) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size


def _is_text(schema: Any, column: str) -> bool:
    import pyarrow

    if column not in schema.names:
        return False
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind))


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    columns = [_values(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _values(column: Any) -> Iterator[Any]:
    """The values of a column; a dictionary's values are created once, however often they occur."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        used = column.indices.unique().drop_null()
        values = dict(zip(used.to_pylist(), _values(column.dictionary.take(used)), strict=True))
        return (None if n is None else values[n] for n in column.indices.to_pylist())
    if pyarrow.types.is_nested(column.type):
        # A struct has every key of the column; where a row lacks one, its value is null.
        return (_without_nulls(value) for value in column.to_pylist())
    if "[ns" not in str(column.type):
        with contextlib.suppress(*NO_VALUE):
            return iter(column.to_pylist())
    return map(_value, column)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _value(scalar: Any) -> Any:
    try:
        value = scalar.as_py()
        # With pandas installed, its own type can represent nanoseconds; the corpus must not depend
        # on that.
        if getattr(value, "nanosecond", 0) or getattr(value, "nanoseconds", 0):
            return Unreadable("bad_record", "a time in nanoseconds")
        return value
    except UnicodeDecodeError:
        return Unreadable("not_utf8")
    except NO_VALUE as error:
        return Unreadable("bad_record", str(error))
