"""JSON lines: one object per line."""

import json
from typing import IO

from nudge.components.common.readers.encodings import utf8_stream
from nudge.components.common.readers.records import ReadOptions, Record, Records, lines, record_of
from nudge.components.common.readers.unreadable import Unreadable


def read_json_lines(stream: IO[bytes], _: str, options: ReadOptions) -> Records:
    """One document per line; each line is an object with the text column."""
    stream, encoding = utf8_stream(stream, options, detect=False)
    for number, raw in enumerate(lines(stream), 1):
        if isinstance(raw, Unreadable):
            yield Record(str(number), raw)
            continue
        try:
            line = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            yield Record(str(number), Unreadable("not_utf8", f"line {number}", len(raw)))
            continue
        if not line.strip():
            continue
        bad = Unreadable("bad_record", f"line {number}", len(raw))
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # deep nesting is a RecursionError
            yield Record(str(number), bad)
            continue
        if not isinstance(row, dict):
            yield Record(str(number), bad)
            continue
        yield record_of(row, number, options)._replace(encoding=encoding)
