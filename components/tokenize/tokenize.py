"""The step `tokenize`: turns a corpus into token shards with document offsets."""

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import (
    published,
    sha256_file,
    sha256_tree,
    verify_file,
)
from nudge.components.common.core.step import step
from nudge.components.tokenize.settings import TokenizeSettings

if TYPE_CHECKING:
    from nudge.components.common.artifacts.tokens import TokenShard
    from nudge.components.tokenize.encode import Encoding


@dataclass(frozen=True)
class Shard:
    """A shard of the corpus, and the token shard that is made from it alone."""

    split: str
    corpus: Path
    sha256: str
    documents: int
    bytes: int
    tokens: Path


@step("tokenize", outputs=("tokens",))
def tokenize(settings: TokenizeSettings, *, corpus: Path, tokens: Path) -> dict[str, Any]:
    """Tokenize both splits with the base model's tokenizer, or with one trained on the corpus.

    ``tokens`` becomes a tokens artifact (`nudge.components.common.artifacts.tokens`): one token
    shard per corpus shard, and the tokenizer's folder. A shard has each document's ids and one
    end-of-document id, as uint16 or uint32 depending on the size of the vocabulary. The number of
    processes and the engine do not change a byte, and memory does not grow with the corpus. Raises
    `UserError` if the corpus or the tokenizer cannot be read.
    """
    from nudge.components.common.artifacts.corpus import SPLITS, read_corpus, read_documents
    from nudge.components.common.artifacts.tokens import (
        Tokens,
        TokenSplit,
        token_dtype,
        write_tokens_manifest,
    )
    from nudge.components.common.core.processes import usable_cores
    from nudge.components.common.core.progress import progress
    from nudge.components.common.models.end_of_document import end_of_document_id
    from nudge.components.tokenize.encode import Encoding
    from nudge.components.tokenize.ids import why_not_fast

    source = read_corpus(corpus)
    if settings.engine == "local":  # read once, when the first text is tokenized
        os.environ["RAYON_NUM_THREADS"] = str(settings.processes or usable_cores())
    with (
        published(tokens) as part,
        progress("tokenize", total=source.documents, unit="documents") as bar,
    ):
        tokenizer = _tokenizer(settings, corpus, part / "tokenizer", bar)
        end, dtype = end_of_document_id(tokenizer), token_dtype(len(tokenizer))
        text = (part / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
        shards = [
            Shard(split, corpus / shard.file, shard.sha256, shard.documents,
                  shard.bytes, part / f"{split}-{number:05d}.tokens")
            for split in SPLITS
            for number, shard in enumerate(source.splits[split].shards)
        ]  # fmt: skip
        why_not = why_not_fast(text, (one.text for one in read_documents(corpus, "train")))
        if why_not:
            print(f"tokenize: slower, without fastokens: {why_not}", file=sys.stderr, flush=True)
        bar.note(stage="tokenizing")
        _write(settings, shards, Encoding(text, end, dtype.str, why_not is None), bar)
        made = {split: [_entry(one) for one in shards if one.split == split] for split in SPLITS}
        splits = {
            split: TokenSplit(
                documents=sum(entry.documents or 0 for entry in entries),
                tokens=sum(entry.tokens or 0 for entry in entries),
                shards=tuple(entries),
            )
            for split, entries in made.items()
        }
        manifest = Tokens(
            corpus_fingerprint=source.fingerprint,
            tokenizer=settings.tokenizer,
            tokenizer_sha256=sha256_tree(part / "tokenizer"),
            vocab_size=len(tokenizer),
            dtype=dtype.name,
            end_of_document_id=end,
            splits=splits,
        )
        write_tokens_manifest(part, manifest)
    return {
        "train_tokens": splits["train"].tokens,
        "validation_tokens": splits["validation"].tokens,
        **{key: getattr(manifest, key) for key in ("vocab_size", "dtype", "tokenizer_sha256")},
    }


def _tokenizer(settings: TokenizeSettings, corpus: Path, folder: Path, bar: Any) -> Any:
    """The tokenizer as transformers loads it; it is also saved into ``folder``."""
    if settings.tokenizer == "train":
        from nudge.components.common.artifacts.corpus import read_documents
        from nudge.components.tokenize.learn import train_tokenizer

        bar.note(stage="training the tokenizer")
        texts = (document.text for document in read_documents(corpus, "train"))
        return train_tokenizer(texts, settings, folder)
    from nudge.components.common.models.base_checks import check_vocabulary
    from nudge.components.common.models.base_model import local_tokenizer, open_tokenizer

    bar.note(stage="loading the tokenizer")
    found = local_tokenizer(settings.base_model)
    tokenizer = open_tokenizer(found, settings.base_model)
    if (found / "config.json").is_file():  # a GGUF file is complete in itself
        check_vocabulary(found, settings.base_model, len(tokenizer))
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"base_model {settings.base_model}: its {type(tokenizer).__name__} cannot be saved as "
            "tokenizer.json; choose a model with a fast tokenizer (Hugging Face tokenizers)"
        )
    return tokenizer


def _write(settings: TokenizeSettings, shards: list[Shard], encoding: "Encoding", bar: Any) -> None:
    """Write the file of every shard."""
    from nudge.components.common.core.processes import usable_cores
    from nudge.components.tokenize.encode import BLOCK_BYTES

    processes = settings.processes or usable_cores()
    if settings.engine == "ray":
        from nudge.components.tokenize.on_ray import write_on_ray

        write_on_ray(shards, encoding, settings.ray_address, processes, bar)
        return
    # Starting a process takes about as long as four blocks.
    worth = sum(shard.bytes for shard in shards) // (4 * BLOCK_BYTES)
    _write_here(shards, encoding, max(1, min(processes, worth)), bar)


def _write_here(shards: list[Shard], encoding: "Encoding", processes: int, bar: Any) -> None:
    import numpy as np

    from nudge.components.common.artifacts.tokens import ShardWriter
    from nudge.components.tokenize.encode import encode_all

    encoded = encode_all(_blocks(shards), encoding, processes)
    done = 0
    for shard, parts in itertools.groupby(encoded, key=lambda pair: pair[0]):
        with shard.tokens.open("wb") as file:
            writer = ShardWriter(file, np.dtype(encoding.dtype))
            for _, part in parts:
                writer.append(part.ids, part.lengths)
                done += int(part.lengths.sum())
                bar.advance(len(part.lengths), tokens=done)
            writer.finish()


def _blocks(shards: list[Shard]) -> Iterator[tuple[Shard, bytes]]:
    from nudge.components.common.artifacts.corpus import read_lines
    from nudge.components.tokenize.encode import BLOCK_BYTES

    for shard in shards:
        verify_file(shard.corpus, shard.sha256)
        with shard.corpus.open("rb") as file:
            for block in read_lines(file, BLOCK_BYTES):
                yield shard, block


def _entry(shard: Shard) -> "TokenShard":
    """The manifest's entry for a shard; asserts that no document was lost."""
    from nudge.components.common.artifacts.tokens import TokenShard, shard_counts

    documents, tokens = shard_counts(shard.tokens)
    assert documents == shard.documents, f"{documents} of {shard.documents} documents of {shard}"
    return TokenShard(
        file=shard.tokens.name,
        sha256=sha256_file(shard.tokens),
        documents=documents,
        tokens=tokens,
    )
