"""Control tokens, such as <|endoftext|>, that a document spells out: their text stays text."""

import itertools
import re
from collections.abc import Callable, Mapping


class ControlTokens:
    """The control tokens of a tokenizer; ``ids`` are theirs, by name."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        names = sorted(filter(None, ids), key=len, reverse=True)
        self._ids = frozenset(ids.values())
        self._beginnings = sorted({name[:2] for name in names})
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def is_in(self, text: str) -> bool:
        """Whether a text spells one out."""
        # The pattern alone takes 10 times as long on English text if names begin with < and with [,
        # as Mistral's do; it is as fast if all begin alike.
        return any(each in text for each in self._beginnings) and bool(self._pattern.search(text))

    def as_text(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """The ids of a text without a control token; ``encode`` does not look for these itself."""
        found = encode(text)
        if self._ids.isdisjoint(found):
            return found
        # Unigram and WordLevel have control tokens in their vocabulary too. No piece spells one
        # out, because each is cut after its first character.
        at = [match.start() + 1 for match in self._pattern.finditer(text)]
        pieces = [text[first:last] for first, last in itertools.pairwise([0, *at, len(text)])]
        return [each for piece in pieces if piece for each in encode(piece)]
