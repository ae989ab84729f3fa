"""MediaWiki's XML dumps (.xml): one document per article, as plain text."""

import re
from pathlib import PurePosixPath
from typing import IO

from nudge.components.common.readers.records import (
    RECORD_BYTES,
    Page,
    ReadOptions,
    Record,
    Records,
)
from nudge.components.common.readers.unreadable import Unreadable

MEDIA = re.compile(r"\s*(file|image|category)\s*:", re.IGNORECASE)
BLANK = re.compile(r"\n{3,}")
ARTICLES = "0"
"""The namespace of articles; the others are discussions, users, files and templates."""


def read_wiki(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """The articles of a dump, which is never in memory as a whole.

    Redirects and pages that are no articles are counted as ``metadata``; XML of any other kind as
    ``unknown_kind``.
    """
    from lxml import etree

    file = PurePosixPath(name).name
    # Entities stay as they are: a few nested ones can expand to gigabytes.
    safe = {"resolve_entities": False, "no_network": True, "huge_tree": False}
    try:
        pages = etree.iterparse(stream, events=("start", "end"), **safe)
        _, root = next(pages)
        if etree.QName(root).localname != "mediawiki":
            yield Record(file, Unreadable("unknown_kind", "XML, but no MediaWiki dump"))
            return
        for event, element in pages:
            if event == "end" and etree.QName(element).localname == "page":
                yield _article(element, file)
                root.clear()
    except (etree.LxmlError, ValueError) as error:
        yield Record(file, Unreadable("bad_record", str(error)[:200]))


def plain_wikitext(raw: bytes) -> str | Unreadable:
    """The text of an article without its markup, templates and links' targets."""
    import mwparserfromhell

    code = mwparserfromhell.parse(raw.decode("utf-8", "replace"))
    tags = code.filter_tags(matches=lambda tag: str(tag.tag) in ("ref", "table", "gallery"))
    media = code.filter_wikilinks(matches=lambda link: bool(MEDIA.match(str(link.title))))
    for node in (*tags, *media):
        try:
            code.remove(node)
        except ValueError:  # it is inside of one that was removed
            continue
    lines = code.strip_code(normalize=True, collapse=True).splitlines()
    text = BLANK.sub("\n\n", "\n".join(line.strip() for line in lines)).strip()
    return text or Unreadable("no_text", bytes=len(raw))


def _article(page: object, file: str) -> Record:
    values: dict[str, str] = {}
    for element in page.iter():  # type: ignore[attr-defined]
        if isinstance(element.tag, str):
            values.setdefault(element.tag.rpartition("}")[2], element.text or "")
    name = values.get("title") or file
    if "redirect" in values or values.get("ns", ARTICLES) != ARTICLES:
        return Record(name, Unreadable("metadata"))
    raw = values.get("text", "").encode("utf-8", "replace")
    if len(raw) > RECORD_BYTES:
        return Record(name, Unreadable("too_long", bytes=len(raw)))
    return Record(name, Page(raw, plain_wikitext, ("mwparserfromhell",)))
