"""Jupyter notebooks: Markdown and code cells in order, without outputs; and Obsidian's canvases."""

import json
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.readers.records import ReadOptions, Record, Records, whole
from nudge.components.common.readers.unreadable import Unreadable


def read_notebook(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """One document per notebook (nbformat 3 and 4)."""
    raw = whole(stream)
    text = raw if isinstance(raw, Unreadable) else notebook_text(raw)
    yield Record(PurePosixPath(name).name, text)


def read_canvas(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """One document per canvas (jsoncanvas.org): the texts on its cards."""
    raw = whole(stream)
    text = raw if isinstance(raw, Unreadable) else canvas_text(raw)
    yield Record(PurePosixPath(name).name, text)


def canvas_text(raw: bytes) -> str | Unreadable:
    """The texts of a canvas, from top to bottom; a card that shows a file or a page has none."""
    try:
        cards = [each for each in json.loads(raw or b"{}").get("nodes", []) if each.get("text")]
        cards.sort(key=lambda card: (card.get("y", 0), card.get("x", 0)))
        texts = [str(card["text"]).strip() for card in cards]
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        return Unreadable("bad_record", f"not a canvas: {error}"[:200], len(raw))
    return "\n\n".join(texts) or Unreadable("no_text", bytes=len(raw))


def notebook_text(raw: bytes) -> str | Unreadable:
    """The sources of a notebook's cells, with blank lines between them."""
    try:
        notebook: Any = json.loads(raw.decode("utf-8-sig"))
        cells = list(notebook.get("cells", []))
        for sheet in notebook.get("worksheets", []):
            cells += sheet.get("cells", [])
        sources = [cell.get("source", cell.get("input", "")) for cell in cells]
        texts = ["".join(source).strip() for source in sources]
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        return Unreadable("bad_record", f"not a notebook: {error}"[:200], len(raw))
    return "\n\n".join(text for text in texts if text) or Unreadable("no_text", bytes=len(raw))
