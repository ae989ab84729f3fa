"""Writes Outlook's .msg files: an OLE container (MS-CFB) with the properties of MS-OXMSG."""

import struct
from collections.abc import Sequence

SECTOR, MINI = 512, 64
FREE, END, FAT = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
TEXTS = {"class": 0x001A, "subject": 0x0037, "body": 0x1000}
HTML = 0x1013


def message(subject: str, body: str = "", html: bytes = b"") -> bytes:
    """A message; an empty body is left out."""
    values = {"class": "IPM.Note", "subject": subject, "body": body}
    streams: list[tuple[str, bytes]] = []
    entries = b""
    for name, value in values.items():
        if value:
            raw = value.encode("utf-16-le")
            streams.append((f"__substg1.0_{TEXTS[name]:04X}001F", raw))
            entries += struct.pack("<HHIQ", 0x001F, TEXTS[name], 6, len(raw) + 2)
    if html:
        streams.append((f"__substg1.0_{HTML:04X}0102", html))
        entries += struct.pack("<HHIQ", 0x0102, HTML, 6, len(html))
    entries += struct.pack("<HHIQ", 0x0003, 0x3FDE, 6, 65001)  # the HTML is UTF-8
    streams.append(("__properties_version1.0", struct.pack("<8x4I8x", 0, 0, 0, 0) + entries))
    return container(streams)


def container(streams: Sequence[tuple[str, bytes]]) -> bytes:
    """An OLE container whose streams, each under 4,096 bytes, are in its mini stream."""
    small: list[int] = []
    content = b""
    entries = []
    for number, (name, raw) in enumerate(streams, 1):
        first, count = len(small), -(-len(raw) // MINI)
        small += [*range(first + 1, first + count), END]
        content += raw.ljust(count * MINI, b"\0")
        following = number + 1 if number < len(streams) else FREE
        entries.append(_entry(name, 2, right=following, first=first, size=len(raw)))
    directory_sectors, content_sectors = -(-(1 + len(streams)) // 4), -(-len(content) // SECTOR)
    begin = 2 + directory_sectors  # after the FAT and the mini FAT
    root = _entry("Root Entry", 5, child=1, first=begin, size=len(content))
    table = [FAT, END, *range(3, begin), END, *range(begin + 1, begin + content_sectors), END]
    parts = (
        _table(table),
        _table(small),
        b"".join([root, *entries]).ljust(directory_sectors * SECTOR, b"\0"),
        content.ljust(content_sectors * SECTOR, b"\0"),
    )
    header = struct.pack(
        "<8s16xHHHHH6xIIIIIIIIII", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        0x3E, 3, 0xFFFE, 9, 6, 0, 1, 2, 0, 4096, 1, 1, END, 0, 0,
    )  # fmt: skip
    return header.ljust(SECTOR, b"\xff") + b"".join(parts)


def _table(numbers: Sequence[int]) -> bytes:
    assert len(numbers) <= SECTOR // 4
    return struct.pack(f"<{len(numbers)}I", *numbers).ljust(SECTOR, b"\xff")


def _entry(
    name: str, kind: int, right: int = FREE, child: int = FREE, first: int = 0, size: int = 0
) -> bytes:
    raw = name.encode("utf-16-le") + b"\0\0"
    return struct.pack(
        "<64sHBBIII16xI16xIQ", raw, len(raw), kind, 1, FREE, right, child, 0, first, size
    )
