"""Splits long documents into pieces, so that one book is enough for a corpus."""

import re
import zlib
from collections.abc import Iterator

from nudge.components.common.core.sample_size import corpus_size

AUTOMATIC, SMALLEST = 4000, 500
"""Characters per piece if nothing is set and the corpus would be too small to split: the first, or
a half, a quarter or an eighth of it, so that a short book too has enough pieces for a verdict."""
FILLED = 0.7
"""How full pieces are on average: 0.71 to 0.77 in the text of the GPL, 3."""
CUT_EVERY = 4
"""A piece that has reached half its maximum length ends after this many paragraphs on average."""


def piece_size(characters: int, validation_share: float) -> int:
    """The characters per piece of a text that is split automatically."""
    size = AUTOMATIC
    while size > SMALLEST and characters < FILLED * size * corpus_size(validation_share):
        size //= 2
    return size


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
