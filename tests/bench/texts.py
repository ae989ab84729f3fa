"""Generated text for benchmarks that resembles real text and has known duplicates.

Word frequencies follow Zipf's law: words of the CPython documentation by rank, then invented rarer
ones. Document lengths are log-normal. A tenth of the documents has an exact duplicate, and a tenth
has a duplicate with two words changed.
"""

import functools
import json
import pydoc_data.topics
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nudge.components.common.artifacts.corpus import Document, write_corpus, zstd

PAGES = list(pydoc_data.topics.topics.values())
"""The pages of CPython's documentation that every Python includes."""


@functools.cache
def words(count: int = 60_000) -> list[str]:
    """Words by rank: first those of the documentation, then invented ones."""
    found = re.findall(r"[A-Za-z']+", "\n\n".join(PAGES))
    known = [word for word, _ in Counter(found).most_common()]
    random = np.random.default_rng(2)
    syllables = [a + b for a in "bcdfghjklmnprstvw" for b in ("a", "e", "i", "o", "u", "en", "or")]
    drawn = random.integers(0, len(syllables), (2 * count, 4)).tolist()
    sizes = random.integers(2, 5, 2 * count).tolist()
    rare = ("".join(syllables[i] for i in row[:n]) for row, n in zip(drawn, sizes, strict=True))
    return list(dict.fromkeys([*known, *rare]))[:count]


def generated(megabytes: float, seed: int = 1) -> Iterator[tuple[int, str]]:
    """Texts of ``megabytes`` MB in total; texts with the same number are duplicates."""
    random = np.random.default_rng(seed)
    vocabulary = words()
    cumulated = np.cumsum(1 / np.arange(1, len(vocabulary) + 1))
    left, number = megabytes * 1e6, 0
    while left > 0:
        length = int(np.clip(random.lognormal(5.6, 0.8), 60, 20_000))
        ranks = np.searchsorted(cumulated, random.random(length) * cumulated[-1])
        drawn = [vocabulary[rank] for rank in ranks.tolist()]
        versions = [_sentences(drawn)]
        chance = random.random()
        if chance < 0.1:
            versions.append(versions[0])
        elif chance < 0.2:
            for position, rank in random.integers(0, (length, len(vocabulary)), (2, 2)).tolist():
                drawn[position] = vocabulary[rank]
            versions.append(_sentences(drawn))
        for text in versions:
            yield number, text
            left -= len(text)
        number += 1


def _sentences(drawn: list[str]) -> str:
    parts = [" ".join(drawn[at : at + 14]) for at in range(0, len(drawn), 14)]
    return ".\n".join(f"{part[:1].upper()}{part[1:]}" for part in parts) + "."


def megabytes_of(texts: Iterable[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def make_corpus(folder: Path, texts: Iterable[str]) -> Path:
    """A corpus artifact of these texts, with the first two in the validation split."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    documents = (Document(str(n), text, "bench") for n, text in enumerate(texts))
    validation = [next(documents) for _ in range(2)]
    write_corpus(folder, {"validation": iter(validation), "train": documents}, {"documents": 0})
    return folder


def write_sources(folder: Path, texts: Iterable[tuple[int, str]], files: int) -> int:
    """Write compressed JSON lines whose ids start with the text's number; return their count."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    opened = [zstd.open(folder / f"{n}.jsonl.zst", "wt", encoding="utf-8") for n in range(files)]
    count = 0
    for count, (number, text) in enumerate(texts, 1):
        line = json.dumps({"id": f"{number}-{count}", "text": text}, ensure_ascii=False)
        opened[count % files].write(line + "\n")
    for file in opened:
        file.close()
    return count


def numbers_in(folder: Path) -> Iterator[int]:
    """The number of each document in a folder's compressed JSON lines."""
    for path in folder.glob("*.zst"):
        with zstd.open(path, "rt", encoding="utf-8") as lines:
            yield from (int(json.loads(line)["id"].split("-")[0]) for line in lines)
