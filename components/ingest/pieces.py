"""Long documents in pieces, so that one book is enough for a corpus."""

import re
import zlib
from collections.abc import Iterator

AUTOMATIC = 4000
"""Characters of a piece where nothing is set and the corpus would be too small to split."""
CUT_EVERY = 4
"""Paragraphs, on average, after which a piece of half its length ends."""


def pieces(text: str, most: int) -> list[str]:
    """The text in pieces of at most ``most`` characters, cut between paragraphs where there are
    any, else between lines or words.

    Where a piece ends depends on the paragraph there and not on what comes before, so that most
    pieces of an edited book stay as they were, and on their side of the split.
    """
    found: list[str] = []
    held: list[str] = []
    size = 0
    for part in _parts(text, most):
        if held and size + len(part) > most:
            found.append("".join(held))
            held, size = [], 0
        held.append(part)
        size += len(part)
        if size >= most // 2 and zlib.crc32(part.strip().encode()) % CUT_EVERY == 0:
            found.append("".join(held))
            held, size = [], 0
    if held:
        found.append("".join(held))
    return [piece.strip() for piece in found if piece.strip()]


def _parts(text: str, most: int) -> Iterator[str]:
    """Paragraphs with what separates them; one that is too long in lines, words or pieces."""
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
