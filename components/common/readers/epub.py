"""Books: the chapters of an .epub file in reading order, as one document."""

import io
import posixpath
import zipfile
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote

from nudge.components.common.readers.office import checked
from nudge.components.common.readers.records import BOMB_BYTES, Page, ReadOptions, Record, Records
from nudge.components.common.readers.unreadable import Unreadable

CONTAINER = "{urn:oasis:names:tc:opendocument:xmlns:container}"
PACKAGE = "{http://www.idpf.org/2007/opf}"


def read_epub(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """One document per book."""
    raw = checked(stream)
    text = raw if isinstance(raw, Unreadable) else Page(raw, epub_text, ("lxml.html",))
    yield Record(PurePosixPath(name).name, text)


def epub_text(raw: bytes) -> str | Unreadable:
    """The text of a book's spine."""
    from lxml import etree

    from nudge.components.common.readers.web import all_text

    parser = etree.XMLParser(resolve_entities=False, no_network=True)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = set(archive.namelist())
        if "META-INF/encryption.xml" in names and "META-INF/rights.xml" in names:
            return Unreadable("encrypted", "the book is protected", len(raw))
        container = etree.fromstring(archive.read("META-INF/container.xml"), parser)
        root: Any = next(container.iter(f"{CONTAINER}rootfile"))
        package_name = root.get("full-path")
        package = etree.fromstring(archive.read(package_name), parser)
        items = {item.get("id"): item.get("href") for item in package.iter(f"{PACKAGE}item")}
        folder = posixpath.dirname(package_name)
        chapters = []
        size = 0
        for reference in package.iter(f"{PACKAGE}itemref"):
            href = unquote(str(items.get(reference.get("idref"), "")).partition("#")[0])
            path = posixpath.normpath(posixpath.join(folder, href))
            if path in names:
                content = archive.read(path)
                size += len(content)
                if size > BOMB_BYTES:
                    return Unreadable("decompression_bomb", bytes=len(raw))
                chapters.append(all_text(content))
    text = "\n\n".join(chapter for chapter in chapters if chapter)
    return text or Unreadable("no_text", bytes=len(raw))
