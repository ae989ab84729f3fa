"""The step `tokenize`: a corpus in, token shards with document offsets out."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nudge.components.common.publish import published, sha256_file, sha256_tree, write_manifest
from nudge.components.common.step import step
from nudge.components.tokenize.settings import TokenizeSettings

if TYPE_CHECKING:
    import numpy as np

SHARD_TOKENS = 100_000_000
"""A shard is closed when it holds this many tokens, which bounds the memory of writing it."""


@step("tokenize", outputs=("tokens",))
def tokenize(settings: TokenizeSettings, *, corpus: Path, tokens: Path) -> dict[str, Any]:
    """Tokenize both splits with the base model's tokenizer.

    ``tokens`` becomes a tokens artifact (`nudge.components.common.tokens`): each document's ids
    with one end-of-document token, uint16 or uint32 by the size of the vocabulary, and the
    tokenizer's folder. Raises `UserError` if the corpus or the tokenizer cannot be read.
    """
    from nudge.components.common.base_model import local_model
    from nudge.components.common.corpus import SPLITS, read_corpus
    from nudge.components.common.progress import progress
    from nudge.components.common.tokens import (
        FORMAT,
        VERSION,
        end_of_document_id,
        token_dtype,
        write_shard,
    )
    from transformers import AutoTokenizer

    source = read_corpus(corpus)
    tokenizer = AutoTokenizer.from_pretrained(
        local_model(settings.base_model), local_files_only=True
    )
    end = end_of_document_id(tokenizer)
    dtype = token_dtype(len(tokenizer))
    splits: dict[str, Any] = {}
    with (
        published(tokens) as part,
        progress("tokenize", total=source["documents"], unit="documents") as bar,
    ):
        for split in SPLITS:
            shards, counts = [], [0, 0]
            documents = _tokenized(corpus, split, tokenizer, end, settings.batch_documents, bar)
            for number, shard in enumerate(_shards(documents)):
                path = part / f"{split}-{number:05d}.tokens"
                write_shard(path, shard, dtype)
                shards.append({"file": path.name, "sha256": sha256_file(path)})
                counts[0] += len(shard)
                counts[1] += sum(map(len, shard))
            splits[split] = {"documents": counts[0], "tokens": counts[1], "shards": shards}
        tokenizer.save_pretrained(part / "tokenizer")
        body = {
            "corpus_fingerprint": source["fingerprint"],
            "tokenizer_sha256": sha256_tree(part / "tokenizer"),
            "vocab_size": len(tokenizer),
            "dtype": dtype.name,
            "end_of_document_id": end,
            "splits": splits,
        }
        write_manifest(part / "manifest.json", FORMAT, VERSION, body)
    return {
        "train_tokens": splits["train"]["tokens"],
        "validation_tokens": splits["validation"]["tokens"],
        **{key: body[key] for key in ("vocab_size", "dtype", "tokenizer_sha256")},
    }


def _tokenized(
    corpus: Path, split: str, tokenizer: Any, end: int, size: int, bar: Any
) -> Iterator["np.ndarray"]:
    import numpy as np
    from nudge.components.common.corpus import read_documents

    documents = read_documents(corpus, split)
    done = 0
    while batch := [document.text for document in itertools.islice(documents, size)]:
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            done += len(ids) + 1
            yield np.array([*ids, end])
        bar.advance(len(batch), tokens=done)


def _shards(documents: Iterator["np.ndarray"]) -> Iterator[list["np.ndarray"]]:
    shard: list[np.ndarray] = []
    held = 0
    for document in documents:
        shard.append(document)
        held += len(document)
        if held >= SHARD_TOKENS:
            yield shard
            shard, held = [], 0
    if shard:
        yield shard
