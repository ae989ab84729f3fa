"""Reads bytes as if they were a file, for the tests of readers."""

import io
from collections import Counter
from typing import Any

from nudge.components.common.readers import (
    Page,
    ReadOptions,
    Record,
    Unreadable,
    read_stream,
)


def records(raw: bytes, name: str, **options: Any) -> list[Record]:
    stream = io.BufferedReader(io.BytesIO(raw))  # type: ignore[type-var]
    found = read_stream(stream, name, ReadOptions(**options))
    return [r._replace(text=r.text.text()) if isinstance(r.text, Page) else r for r in found]


def texts(raw: bytes, name: str, **options: Any) -> list[Any]:
    return [record.text for record in records(raw, name, **options)]


def counted(raw: bytes, name: str, **options: Any) -> Counter[str]:
    found = texts(raw, name, **options)
    return Counter(t.reason if isinstance(t, Unreadable) else "read" for t in found)
