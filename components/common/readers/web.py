"""Web pages: the main text of .html and .htm files, extracted by trafilatura."""

import re
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.readers.encodings import decoded
from nudge.components.common.readers.records import Page, ReadOptions, Record, Records, whole
from nudge.components.common.readers.unreadable import Unreadable

DECLARED = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([\w.:-]{2,40})""", re.IGNORECASE)
DECLARED_BYTES = 4096
CHATGPT, CHATGPT_BYTES = b"var jsonData = [", 1 << 16
"""ChatGPT's export has its conversations.json a second time, in the script of chat.html."""
BLOCKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "br",
        "caption",
        "dd",
        "div",
        "dl",
        "dt",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "nav",
        "ol",
        "p",
        "pre",
        "section",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "ul",
    ]
)
HIDDEN = frozenset(("head", "script", "style", "template", "noscript"))


def read_html(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The page's main text, without menus and footers."""
    raw = whole(stream)
    text: Any = raw
    encoding = ""
    if not isinstance(raw, Unreadable) and CHATGPT in raw[:CHATGPT_BYTES]:
        text = Unreadable("metadata")
    elif not isinstance(raw, Unreadable):
        found = DECLARED.search(raw, 0, DECLARED_BYTES)
        declared = found.group(1).decode("ascii", "replace") if found else ""
        text, encoding = decoded(raw, options, declared)
        if isinstance(text, str):
            text = Page(raw if not encoding else text.encode(), main_text, ("trafilatura",))
    yield Record(PurePosixPath(name).name, text, encoding=encoding)


def main_text(raw: bytes) -> str | Unreadable:
    """The main text of a UTF-8 page."""
    import trafilatura

    page: Any = raw.decode("utf-8-sig")
    lower = page.lower()
    if "<li" in lower and "<table" in lower:
        page = _flat_cells(page)
    return trafilatura.extract(page) or Unreadable("no_main_text", bytes=len(raw))


def _flat_cells(page: str) -> Any:
    """The page with lists in table cells turned into plain text; trafilatura drops such lists."""
    from lxml import etree, html

    try:
        tree = html.document_fromstring(page)
    except (etree.LxmlError, ValueError):  # trafilatura fails on such a page too, and reports it
        return page
    items = tree.xpath("//td//li | //th//li")
    if not items:
        return page
    for item in items:
        item.tail = f" {item.tail or ''}"
        item.drop_tag()
    for group in tree.xpath("//td//ul | //td//ol | //th//ul | //th//ol"):
        group.drop_tag()
    return tree


def all_text(raw: bytes) -> str:
    """All visible text of an HTML document, block by block; for books and mail."""
    from lxml import etree, html

    if not raw.strip():
        return ""
    try:
        tree = html.document_fromstring(raw, html.HTMLParser(encoding=_utf8_if_valid(raw)))
    except (etree.LxmlError, ValueError):
        return ""
    parts: list[str] = []
    for event, element in etree.iterwalk(tree, events=("start", "end")):
        tag = element.tag if isinstance(element.tag, str) else ""
        is_hidden = tag in HIDDEN or not tag
        if event == "start":
            if tag in BLOCKS:
                parts.append("\n" if tag in ("br", "li", "tr") else "\n\n")
            if element.text and not is_hidden and not _is_hidden(element):
                parts.append(re.sub(r"\s+", " ", element.text))
        else:
            if tag in BLOCKS and tag != "br":
                parts.append(" " if tag in ("td", "th") else "\n")
            if element.tail and not _is_hidden(element.getparent()):
                parts.append(re.sub(r"\s+", " ", element.tail))
    lines = (line.strip() for line in "".join(parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _utf8_if_valid(raw: bytes) -> str | None:
    """UTF-8 if the bytes are valid; without a declaration, lxml would read them as latin-1."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return None
    return "utf-8"


def _is_hidden(element: Any) -> bool:
    while element is not None:
        if element.tag in HIDDEN:
            return True
        element = element.getparent()
    return False
