"""The corpus artifact: documents of two splits in compressed JSON lines, under one manifest.

``manifest.json`` (nudge.corpus, version 1) holds the fingerprint, the counts and each shard's
sha256; a shard is ``<split>-00000.jsonl.zst``, a document a line: ``{"id", "text", "source"}``, and
``"license"`` and ``"origin"`` where its data said so.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nudge.components.common.core.publish import (
    read_manifest,
    sha256_file,
    verify_file,
    write_manifest,
)

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

FORMAT, VERSION = "nudge.corpus", 1
SPLITS = ("train", "validation")
SHARD_DOCUMENTS, SHARD_BYTES = 100_000, 256 << 20


@dataclass(frozen=True)
class Document:
    """One document; ``source`` is the URI that it was read from, ``origin`` what its data says."""

    id: str
    text: str
    source: str
    license: str = ""
    origin: str = ""


def read_corpus(corpus: Path) -> dict[str, Any]:
    """The manifest of a corpus; raises `UserError` if the folder is none."""
    return read_manifest(corpus / "manifest.json", FORMAT, VERSION)


def read_documents(corpus: Path, split: str) -> Iterator[Document]:
    """The documents of a split in their stored order, each shard checked by its sha256 first."""
    for shard in read_corpus(corpus)["splits"][split]["shards"]:
        path = corpus / shard["file"]
        verify_file(path, shard["sha256"])
        with zstd.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield Document(**json.loads(line))


def read_lines(shard: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """The JSON lines of an open shard in blocks of whole lines, each of about ``block_bytes``."""
    with zstd.open(shard, "rb") as lines:
        while block := lines.readlines(block_bytes):
            yield b"".join(block)


def write_corpus(
    folder: Path, documents: Mapping[str, Iterable[Document]], facts: dict[str, Any]
) -> str:
    """Write shards and manifest into ``folder``; returns the fingerprint.

    The documents of each split come in the order of their text's sha256, so that neither the order
    of the sources nor timing changes a byte. ``facts`` are further values of the manifest.
    """
    splits: dict[str, Any] = {}
    digest = hashlib.sha256()
    for split in SPLITS:
        shards: list[dict[str, Any]] = []
        left = iter(documents[split])
        while first := list(itertools.islice(left, 1)):
            path = folder / f"{split}-{len(shards):05d}.jsonl.zst"
            shards.append(_write_shard(path, itertools.chain(first, left), split, digest))
        splits[split] = {
            "documents": sum(shard["documents"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
            "shards": shards,
        }
    fingerprint = digest.hexdigest()
    body = {**facts, "fingerprint": fingerprint, "splits": splits}
    write_manifest(folder / "manifest.json", FORMAT, VERSION, body)
    return fingerprint


def text_sha256(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def _write_shard(
    path: Path, documents: Iterator[Document], split: str, digest: Any
) -> dict[str, Any]:
    """Write documents until the shard is full; the rest stays in the iterator."""
    count = size = 0
    with zstd.open(path, "wt", level=6, encoding="utf-8", newline="\n") as lines:
        for document in documents:
            digest.update(f"{split} {text_sha256(document.text)}\n".encode())
            values = {k: v for k, v in vars(document).items() if v or k in ("id", "text", "source")}
            lines.write(json.dumps(values, ensure_ascii=False) + "\n")
            count, size = count + 1, size + len(document.text.encode())
            if count >= SHARD_DOCUMENTS or size >= SHARD_BYTES:
                break
    return {"file": path.name, "sha256": sha256_file(path), "documents": count, "bytes": size}
