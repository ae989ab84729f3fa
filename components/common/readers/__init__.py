"""Readers for all file formats, shared by the steps that read users' files."""

from nudge.components.common.readers.names import COMPRESSED, CONVERTED, hidden_part, suffix_of
from nudge.components.common.readers.records import Page, ReadOptions, Record, Records
from nudge.components.common.readers.registry import accepted, read_stream, readers, reason_unread
from nudge.components.common.readers.unreadable import Unreadable

__all__ = [
    "COMPRESSED",
    "CONVERTED",
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
