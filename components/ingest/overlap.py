"""Finds training text that shares word n-grams with the texts that a model is evaluated on.

A model that was trained on a guard's sentences shows no forgetting there, and one that was trained
on a test's answers knows them. Following Brown et al. 2020 (arXiv 2005.14165, appendix C), a
document overlaps if it shares 13 consecutive words with such a text, without case, accents and
punctuation. A text of 8 to 12 words counts with all of its words; a shorter one, such as a name,
may stand anywhere and is not compared.
"""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from nudge.components.common.core.errors import UserError
from nudge.components.ingest.duplicates import gram_hashes, word_hashes

if TYPE_CHECKING:
    from nudge.components.ingest.settings import IngestSettings

WORDS, FEWEST_WORDS = 13, 8
SLOTS = 20
"""A table of 2**20 bytes excludes nearly every gram of a text at one look-up each."""


class Overlap:
    """The n-grams to keep out of training: the sorted hashes of those of each number of words."""

    def __init__(self, grams: dict[int, np.ndarray]) -> None:
        self.grams = grams
        self._tables = {width: _table(hashes) for width, hashes in grams.items()}

    @property
    def sha256(self) -> str:
        """Hex sha256 of the n-grams; empty if there are none."""
        if not self.grams:
            return ""
        digest = hashlib.sha256()
        for words, hashes in sorted(self.grams.items()):
            digest.update(f"{words}\n".encode() + hashes.tobytes())
        return digest.hexdigest()

    def is_in(self, words: np.ndarray) -> bool:
        """Whether a text has one of the n-grams, from the hashes of its words."""
        for width, hashes in self.grams.items():
            if len(words) < width:
                continue
            of_text = gram_hashes(words, width)
            possible = of_text[self._tables[width][of_text >> np.uint64(64 - SLOTS)]]
            # np.isin would sort all hashes each time, 30 ms for those of 2,000 texts.
            at = np.minimum(np.searchsorted(hashes, possible), len(hashes) - 1)
            if bool((hashes[at] == possible).any()):
                return True
        return False


def overlap_of(texts: Iterable[str]) -> Overlap:
    """The n-grams of ``texts``."""
    found: dict[int, list[np.ndarray]] = {}
    for text in texts:
        words = word_hashes(text)
        width = min(WORDS, len(words))
        if width >= FEWEST_WORDS:
            found.setdefault(width, []).append(gram_hashes(words, width))
    return Overlap({width: np.unique(np.concatenate(of)) for width, of in sorted(found.items())})


def texts_to_keep_out(settings: "IngestSettings") -> list[str]:
    """The texts that the settings keep out of training; raises `UserError` if one is unreadable."""
    from nudge.components.common.readers.curated import curated_texts

    texts = list(settings.keep_out_texts)
    for uri in settings.keep_out:
        where = "ingest.keep_out (which includes evaluate.guards)"
        found = curated_texts(uri, where)
        if not found:
            raise UserError(f"{where}: {uri} has no text; correct the path, or remove it")
        texts += found
    if settings.keep_out_tasks:
        from nudge.components.common.readers.harness import task_texts

        texts += task_texts(settings.keep_out_tasks, settings.task_folder)
    return texts


def _table(hashes: np.ndarray) -> np.ndarray:
    """Which upper bits the hashes have; bool [2**SLOTS]."""
    table = np.zeros(1 << SLOTS, bool)
    table[hashes >> np.uint64(64 - SLOTS)] = True
    return table
