"""Splits long documents into pieces, so that one book is enough for a corpus."""

import re
import zlib
from collections.abc import Iterator

AUTOMATIC = 4000
"""Characters per piece if nothing is set and the corpus would be too small to split."""
CUT_EVERY = 4
"""A piece that has reached half its maximum length ends after this many paragraphs on average."""


def pieces(text: str, most: int) -> list[str]:
    """The text in pieces of at most ``most`` characters, cut between paragraphs if it has any, else
    between lines or words.

    The end of a piece depends on the paragraph there and not on the text before it. So after an
    edit most pieces of a book stay the same, and stay in their split.
    """
    found: list[str] = []
    current: list[str] = []
    size = 0
    for part in _parts(text, most):
        if current and size + len(part) > most:
            found.append("".join(current))
            current, size = [], 0
        current.append(part)
        size += len(part)
        if size >= most // 2 and zlib.crc32(part.strip().encode()) % CUT_EVERY == 0:
            found.append("".join(current))
            current, size = [], 0
    if current:
        found.append("".join(current))
    return [piece.strip() for piece in found if piece.strip()]


def _parts(text: str, most: int) -> Iterator[str]:
    """Paragraphs with their separators; a long one is cut at lines, words or characters."""
    for paragraph in re.findall(r"(?s).+?(?:\n[ \t]*\n\s*|$)", text):
        if len(paragraph) <= most:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            while len(line) > most:
                cut = line.rfind(" ", 0, most) + 1 or most
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line
