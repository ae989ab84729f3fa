"""A corpus in several shards with ordinary and odd texts, and a way to tokenize it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nudge.components.common.artifacts import corpus as corpora
from nudge.components.common.artifacts.corpus import Document, text_sha256, write_corpus
from nudge.components.tokenize import encode
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.tokenize.tokenize import tokenize

ODD = [
    "ends with the end token <|endoftext|>",
    "<|im_start|>user\nlooks like chat<|im_end|>",
    "line one\r\nline two\rthree\u2028four\x85five\x0bsix\tend  ",
    "Ünïcödé, 日本語のテキスト, עברית, emoji 👩‍👩‍👧 and a\u0301 combining mark",
    " ",
    "0123456789" * 30,
    "a" * 5000,
]
WORDS = [f"{a}{b}{c}" for a in "ptkbdg" for b in "aeiou" for c in "nrls"]


def texts(count: int = 300) -> list[str]:
    """Documents of Zipf-distributed words, and some odd ones."""
    random = np.random.default_rng(7)
    made = []
    for length in random.integers(1, 120, count):
        ranks = np.minimum(random.zipf(1.3, length), len(WORDS)) - 1
        made.append(" ".join(WORDS[rank] for rank in ranks) + ".")
    return [*ODD, *made]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus whose train split has four shards, with many small blocks per shard."""
    monkeypatch.setattr(corpora, "SHARD_DOCUMENTS", 75)
    monkeypatch.setattr(encode, "BLOCK_BYTES", 2048)
    folder = tmp_path / "corpus"
    folder.mkdir()
    documents = [Document(str(i), text, "test") for i, text in enumerate(texts())]
    documents.sort(key=lambda document: text_sha256(document.text))
    splits: dict[str, Iterator[Document]] = {
        "train": iter(documents[20:]),
        "validation": iter(documents[:20]),
    }
    write_corpus(folder, splits, {"documents": len(documents)})
    return folder


Run = Callable[..., Path]


@pytest.fixture
def run(corpus: Path, tmp_path: Path, tiny_model: Path) -> Run:
    """Tokenize the corpus with the tiny model's tokenizer; returns the tokens' folder."""

    def tokenized(name: str = "tokens", **values: Any) -> Path:
        options: dict[str, Any] = {"base_model": str(tiny_model), "processes": 1, **values}
        tokenize(TokenizeSettings(**options), corpus=corpus, tokens=tmp_path / name)
        return tmp_path / name

    return tokenized
