"""Office files: .docx, .pptx, .odt, .odp (zip archives, which may be bombs) and .rtf."""

import io
import itertools
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.readers.archive import is_bomb
from nudge.components.common.readers.records import (
    DAMAGED_ARCHIVE,
    Page,
    ReadOptions,
    Record,
    Records,
    whole,
)
from nudge.components.common.readers.unreadable import Unreadable

OPEN_DOCUMENT = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}"
ENCRYPTED = b"\xd0\xcf\x11\xe0"
"""An OLE container: an office file with a password, or in the format from before Office 2007."""


def read_docx(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """A Word document: paragraphs and tables in order."""
    yield _page(stream, name, docx_text, "docx")


def read_pptx(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """A presentation: the texts, tables and notes of each slide."""
    yield _page(stream, name, pptx_text, "pptx")


def read_odt(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """An OpenDocument text or presentation: headings and paragraphs."""
    yield _page(stream, name, odt_text, "lxml.etree")


def read_rtf(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """A document in the Rich Text Format."""
    raw = whole(stream)
    text: Any = raw if isinstance(raw, Unreadable) else Page(raw, rtf_text, ("striprtf.striprtf",))
    yield Record(PurePosixPath(name).name, text)


def docx_text(raw: bytes) -> str | Unreadable:
    """The text of a Word document."""
    import docx

    document = docx.Document(io.BytesIO(raw))
    parts = [
        block.text if hasattr(block, "text") else _table(block)
        for block in document.iter_inner_content()
    ]
    return _joined(parts, raw)


def pptx_text(raw: bytes) -> str | Unreadable:
    """The text of a presentation."""
    import pptx

    parts: list[str] = []
    for slide in pptx.Presentation(io.BytesIO(raw)).slides:
        parts += _shapes(slide.shapes)
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            parts.append(slide.notes_slide.notes_text_frame.text)
    return _joined(parts, raw)


def odt_text(raw: bytes) -> str | Unreadable:
    """The text of an OpenDocument text or presentation."""
    from lxml import etree

    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        content = archive.read("content.xml")
    parser = etree.XMLParser(resolve_entities=False, no_network=True)
    tree = etree.fromstring(content, parser)
    blocks = tree.iter(f"{OPEN_DOCUMENT}h", f"{OPEN_DOCUMENT}p")
    return _joined(["".join(_odt_inline(block)) for block in blocks], raw)


def rtf_text(raw: bytes) -> str | Unreadable:
    """The text of an RTF file; characters beyond ASCII are escaped in it."""
    from striprtf.striprtf import rtf_to_text

    if not raw.lstrip().startswith(b"{\\rtf"):
        return Unreadable("damaged", "it does not begin with {\\rtf", len(raw))
    text = rtf_to_text(raw.decode("cp1252", "replace"), errors="replace")
    return _joined(text.split("\n\n"), raw)


def _page(stream: IO[bytes], name: str, finder: Any, library: str) -> Record:
    raw = checked(stream)
    text = raw if isinstance(raw, Unreadable) else Page(raw, finder, (library,))
    return Record(PurePosixPath(name).name, text)


def checked(stream: IO[bytes]) -> bytes | Unreadable:
    """The bytes of an archive, or why it is refused: encrypted, damaged or a bomb."""
    raw = whole(stream)
    if isinstance(raw, Unreadable):
        return raw
    if raw.startswith(ENCRYPTED):
        return Unreadable("encrypted", "it has a password, or is from before Office 2007", len(raw))
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if any(is_bomb(member) for member in archive.infolist()):
                return Unreadable("decompression_bomb", bytes=len(raw))
    except (zipfile.BadZipFile, *DAMAGED_ARCHIVE) as error:
        return Unreadable("damaged", str(error), len(raw))
    return raw


def _joined(parts: list[str], raw: bytes) -> str | Unreadable:
    texts = (part.strip() for part in parts)
    return "\n\n".join(text for text in texts if text) or Unreadable("no_text", bytes=len(raw))


def _table(table: Any) -> str:
    rows = []
    for row in table.rows:
        # A merged cell appears once per column that it covers.
        cells = [
            cell
            for _, group in itertools.groupby(row.cells, lambda cell: cell._tc)
            for cell in [next(group)]
        ]
        rows.append(" | ".join(" ".join(cell.text.split()) for cell in cells))
    return "\n".join(rows)


def _shapes(shapes: Any) -> Iterator[str]:
    for shape in shapes:
        if getattr(shape, "has_text_frame", False):
            yield shape.text_frame.text
        elif getattr(shape, "has_table", False):
            for row in shape.table.rows:
                yield " | ".join(cell.text for cell in row.cells)
        elif hasattr(shape, "shapes"):
            yield from _shapes(shape.shapes)


def _odt_inline(element: Any) -> Iterator[str]:
    yield element.text or ""
    for child in element:
        name = str(child.tag).removeprefix(OPEN_DOCUMENT)
        if name == "s":
            yield " " * min(int(child.get(f"{OPEN_DOCUMENT}c", 1)), 1000)
        elif name in ("tab", "line-break"):
            yield "\t" if name == "tab" else "\n"
        elif name not in ("p", "h", "tracked-changes"):
            yield from _odt_inline(child)
        yield child.tail or ""
