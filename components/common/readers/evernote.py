"""Evernote's exports (.enex): one document per note, its title and text."""

from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.readers.records import (
    RECORD_BYTES,
    Page,
    ReadOptions,
    Record,
    Records,
)
from nudge.components.common.readers.unreadable import Unreadable


def read_enex(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """The notes of an export; attached files, which are base64 in it, are skipped."""
    from lxml import etree

    file = PurePosixPath(name).name
    # Entities stay as they are: a few nested ones can expand to gigabytes. Attachments are large.
    safe = {"resolve_entities": False, "no_network": True, "load_dtd": False, "huge_tree": True}
    number = 0
    try:
        for _event, element in etree.iterparse(stream, tag=("note", "data"), **safe):
            if element.tag == "note":
                number += 1
                yield Record(f"{file}:{number}", _note(element))
            element.clear()
    except (etree.LxmlError, ValueError) as error:
        yield Record(file, Unreadable("bad_record", str(error)[:200]))
        return
    if not number:
        yield Record(file, Unreadable("no_text"))


def note_text(raw: bytes) -> str | Unreadable:
    """The text of a note: a line with its title, then XHTML (ENML)."""
    from nudge.components.common.readers.web import all_text

    title, _, content = raw.partition(b"\n")
    # lxml's HTML parser takes no declaration of an encoding before text.
    start = max(content.find(b"<en-note"), 0)
    parts = title.decode("utf-8", "replace").strip(), all_text(content[start:]).strip()
    return "\n\n".join(part for part in parts if part) or Unreadable("no_text", bytes=len(raw))


def _note(element: Any) -> Page | Unreadable:
    title = " ".join((element.findtext("title") or "").split())
    raw = f"{title}\n{element.findtext('content') or ''}".encode("utf-8", "replace")
    if len(raw) > RECORD_BYTES:
        return Unreadable("too_long", bytes=len(raw))
    return Page(raw, note_text, ("lxml.html",))
