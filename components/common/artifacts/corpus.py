"""The corpus artifact: documents of two splits in compressed JSON lines, under one manifest.

``manifest.json`` (nudge.corpus, version 1) has the fingerprint, the counts and each shard's sha256.
A shard is ``<split>-00000.jsonl.zst`` with one document per line: ``{"id", "text", "source"}``, and
``"license"`` and ``"origin"`` where the data has them. A conversation has ``"messages"``, and
``"tools"`` if it has any, instead of ``"text"`` (`nudge.components.common.chat.conversation`). Text
and conversations can be mixed; the manifest counts the ``conversations``.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from nudge.components.common.artifacts.schema import (
    Omitted,
    parse_artifact,
    read_artifact,
    write_artifact,
)
from nudge.components.common.chat.conversation import Conversation, from_plain
from nudge.components.common.core.publish import sha256_file, verify_file

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
SHARD_DOCUMENTS, SHARD_BYTES = 100_000, 256 << 20


@dataclass(frozen=True)
class Document:
    """One document: a text, or a conversation with an empty ``text``. ``source`` is the URI it was
    read from; ``origin`` is what its data names."""

    id: str
    text: str
    source: str
    license: str = ""
    origin: str = ""
    conversation: Conversation | None = None

    @property
    def body(self) -> str:
        """What its hash is computed from: the text, or the JSON of the conversation."""
        return self.conversation.to_json() if self.conversation else self.text

    @property
    def plain_text(self) -> str:
        """The text, or the text of every turn; for statistics, never for training."""
        return self.conversation.transcript() if self.conversation else self.text


TEXT_KEYS = frozenset(("id", "text", "source", "license", "origin"))


def document_of(values: dict[str, Any]) -> Document:
    """The document of one line of a shard; keys that a later release added are ignored."""
    conversation = from_plain(values) if "messages" in values else None
    kept = {key: value for key, value in values.items() if key in TEXT_KEYS}
    return Document(**{"text": "", **kept}, conversation=conversation)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a split; ``bytes`` is the size of its texts, and of the JSON of its
    conversations, in UTF-8."""

    file: str
    sha256: str
    documents: int
    bytes: int
    conversations: int = 0


@dataclass(frozen=True, kw_only=True)
class Split:
    """The documents of a split; ``conversations`` counts those that are conversations."""

    documents: int = 0
    bytes: int = 0
    conversations: int = 0
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """One object that was read, and what became of its documents.

    ``bytes`` is its size as stored; ``text_bytes_in`` and ``dropped_bytes`` count text.
    """

    uri: str
    sha256: Omitted[str] = None
    bytes: int | None = None
    documents_in: Omitted[int] = None
    documents: int | None = None
    kept_bytes: Omitted[int] = None
    text_bytes_in: Omitted[int] = None
    text_bytes_kept: Omitted[int] = None
    dropped: Omitted[dict[str, int]] = None
    dropped_bytes: Omitted[dict[str, int]] = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Documents with one value of a column. ``value`` is None for documents without one, and for
    the ``others``: the number of further values that are counted together."""

    value: str | None
    documents: int
    bytes: int
    others: Omitted[int] = None


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """The documents of one source of a mix, and the weight that was asked for."""

    name: str
    weight: float
    train_documents: int
    validation_documents: int


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The manifest of a corpus. Counts are 0 where an older release did not record them."""

    FORMAT: ClassVar[str] = "nudge.corpus"
    VERSION: ClassVar[int] = 1

    fingerprint: str
    splits: dict[str, Split]
    documents_in: int = 0
    documents: int = 0
    conversations: int = 0
    """Documents that are conversations; the others are texts."""
    bytes: int = 0
    text_bytes_in: int = 0
    text_bytes_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents by reason."""
    dropped_bytes: dict[str, int] = field(default_factory=dict)
    encodings: dict[str, int] = field(default_factory=dict)
    """Documents in encodings other than UTF-8."""
    sources: tuple[Source, ...] = ()
    train_documents: int = 0
    validation_documents: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    """Documents of a sample, by language."""
    mix: Omitted[tuple[Mixed, ...]] = None
    licenses: Omitted[tuple[Group, ...]] = None
    origins: Omitted[tuple[Group, ...]] = None


def read_corpus(corpus: Path) -> Corpus:
    """The manifest of a corpus folder; raises `UserError` if the folder has none."""
    return read_artifact(corpus / MANIFEST, Corpus)


def read_documents(corpus: Path, split: str) -> Iterator[Document]:
    """The documents of a split in stored order; each shard's sha256 is checked first."""
    for shard in read_corpus(corpus).splits[split].shards:
        path = corpus / shard.file
        verify_file(path, shard.sha256)
        with zstd.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield document_of(json.loads(line))


def read_lines(shard: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """The JSON lines of an open shard, in blocks of complete lines of about ``block_bytes``."""
    with zstd.open(shard, "rb") as lines:
        while block := lines.readlines(block_bytes):
            yield b"".join(block)


def write_corpus(
    folder: Path, documents: Mapping[str, Iterable[Document]], facts: dict[str, Any]
) -> str:
    """Write shards and manifest into ``folder``; returns the fingerprint.

    The documents of each split must come in the order of their body's sha256, so that neither the
    order of the sources nor timing changes a byte. ``facts`` are further fields of `Corpus`.
    """
    splits: dict[str, Split] = {}
    digest = hashlib.sha256()
    for split in SPLITS:
        shards: list[Shard] = []
        remaining = iter(documents[split])
        while first := list(itertools.islice(remaining, 1)):
            path = folder / f"{split}-{len(shards):05d}.jsonl.zst"
            shards.append(_write_shard(path, itertools.chain(first, remaining), split, digest))
        splits[split] = Split(
            documents=sum(shard.documents for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            conversations=sum(shard.conversations for shard in shards),
            shards=tuple(shards),
        )
    body = {**facts, "fingerprint": digest.hexdigest(), "splits": splits}
    manifest = parse_artifact(body, Corpus, str(folder))
    write_artifact(folder / MANIFEST, manifest)
    return manifest.fingerprint


def text_sha256(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def _write_shard(path: Path, documents: Iterator[Document], split: str, digest: Any) -> Shard:
    """Write documents until the shard is full; the rest remain in the iterator."""
    count = size = conversations = 0
    with zstd.open(path, "wt", level=6, encoding="utf-8", newline="\n") as lines:
        for document in documents:
            body = document.body
            digest.update(f"{split} {text_sha256(body)}\n".encode())
            lines.write(json.dumps(_line(document), ensure_ascii=False) + "\n")
            count, size = count + 1, size + len(body.encode())
            conversations += document.conversation is not None
            if count >= SHARD_DOCUMENTS or size >= SHARD_BYTES:
                break
    return Shard(
        file=path.name,
        sha256=sha256_file(path),
        documents=count,
        bytes=size,
        conversations=conversations,
    )


def _line(document: Document) -> dict[str, Any]:
    """The JSON values of a document, without empty ones."""
    body = document.conversation.plain() if document.conversation else {"text": document.text}
    values = {"id": document.id, **body, "source": document.source}
    named = {"license": document.license, "origin": document.origin}
    return values | {key: value for key, value in named.items() if value}
