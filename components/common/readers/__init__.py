"""Readers for all file formats, shared by the steps that read users' files."""

from nudge.components.common.readers.records import (
    Page,
    ReadOptions,
    Record,
    Records,
    Unreadable,
)
from nudge.components.common.readers.registry import (
    COMPRESSED,
    accepted,
    hidden_part,
    read_stream,
    readers,
    reason_unread,
    suffix_of,
)

__all__ = [
    "COMPRESSED",
    "Page",
    "ReadOptions",
    "Record",
    "Records",
    "Unreadable",
    "accepted",
    "hidden_part",
    "read_stream",
    "readers",
    "reason_unread",
    "suffix_of",
]
