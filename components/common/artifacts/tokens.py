"""The tokens artifact: token shards with an index of documents, and the tokenizer's folder.

A shard is one file, little-endian:

| bytes | what |
|---|---|
| 8 | magic ``NUDGETOK`` |
| 4 x uint32 | version, bytes per token (2 or 4), two zeros |
| 2 x uint64 | documents, tokens |
| tokens x uint16 or uint32 | the documents one after another, each with its end token |
| padding to a multiple of 8 | zeros |
| (documents + 1) x int64 | the offset of each document, in tokens; last, the number of tokens |

``manifest.json`` (nudge.tokens, version 1) has each shard's sha256 and counts, the tokenizer's
sha256, and its end-of-document id.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from nudge.components.common.artifacts.schema import Omitted, read_artifact, write_artifact
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_tree, verify_file

MANIFEST = "manifest.json"
MAGIC = b"NUDGETOK"
HEADER = struct.Struct("<8sIIIIQQ")
SHARD_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """One file of a split; the counts are None where they were not recorded."""

    file: str
    sha256: str
    documents: Omitted[int] = None
    tokens: Omitted[int] = None


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    shards: tuple[TokenShard, ...]
    documents: Omitted[int] = None
    tokens: Omitted[int] = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The manifest of a tokens artifact."""

    FORMAT: ClassVar[str] = "nudge.tokens"
    VERSION: ClassVar[int] = 1

    splits: dict[str, TokenSplit]
    corpus_fingerprint: str = ""
    tokenizer: str = ""
    """The setting: a URI, ``base_model``, or ``train`` for one trained on the corpus."""
    tokenizer_sha256: str = ""
    vocab_size: int = 0
    dtype: str = ""
    end_of_document_id: int = 0


def read_tokens_manifest(tokens: Path) -> Tokens:
    """The manifest of a tokens artifact; raises `UserError` if the folder has none."""
    return read_artifact(tokens / MANIFEST, Tokens)


def write_tokens_manifest(tokens: Path, manifest: Tokens) -> None:
    """Write the manifest of a tokens artifact."""
    write_artifact(tokens / MANIFEST, manifest)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 if every id of the vocabulary fits, else uint32; both little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes a shard as its documents arrive; only 8 bytes per document stay in memory."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file, self._dtype = file, dtype
        self._lengths: list[np.ndarray] = []
        file.write(bytes(HEADER.size))  # without the magic, so a file cut off here is not a shard

    def append(self, ids: bytes, lengths: np.ndarray) -> None:
        """Add documents: their concatenated ids in the dtype, and the length of each."""
        assert len(ids) == int(lengths.sum()) * self._dtype.itemsize
        self._file.write(ids)
        self._lengths.append(lengths)

    def finish(self) -> tuple[int, int]:
        """Write index and header; returns the number of documents and of tokens."""
        lengths = np.concatenate([np.zeros(1, "<i8"), *self._lengths])
        starts = np.cumsum(lengths, dtype="<i8")
        documents, tokens = len(starts) - 1, int(starts[-1])
        self._file.write(bytes(-self._file.tell() % 8))
        self._file.write(starts.tobytes())
        self._file.seek(0)
        width = self._dtype.itemsize
        self._file.write(HEADER.pack(MAGIC, SHARD_VERSION, width, 0, 0, documents, tokens))
        return documents, tokens


def write_shard(path: Path, documents: list[np.ndarray], dtype: np.dtype[Any]) -> None:
    """Write documents, each an integer array of ids, as one shard; ids must fit ``dtype``."""
    with path.open("wb") as file:
        writer = ShardWriter(file, dtype)
        for document in documents:
            assert document.size == 0 or int(document.max()) <= np.iinfo(dtype).max
            writer.append(document.astype(dtype).tobytes(), np.array([len(document)]))
        writer.finish()


def verified_tokenizer(tokens: Path) -> Path:
    """The tokenizer folder of a tokens artifact.

    Raises `UserError` if it is not the tokenizer that made the tokens.
    """
    folder = tokens / "tokenizer"
    wanted, actual = read_tokens_manifest(tokens).tokenizer_sha256, sha256_tree(folder)
    if actual != wanted:
        raise UserError(
            f"{folder} is not the tokenizer of these tokens: its sha256 is {actual}, but the "
            f"manifest says {wanted}; tokenize the corpus again"
        )
    return folder


class TokenReader:
    """The documents of a split, memory-mapped; opening it checks the sha256 of each shard.

    Raises `UserError` if a shard is missing, damaged or of another format.
    """

    def __init__(self, tokens: Path, split: str) -> None:
        self.manifest = read_tokens_manifest(tokens)
        self._shards: list[tuple[np.ndarray, np.ndarray]] = []
        shards = self.manifest.splits[split].shards
        self.sha256 = hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest()
        for shard in shards:
            path = tokens / shard.file
            verify_file(path, shard.sha256)
            ids, starts = _open(path)
            _check_counts(path, shard, ids, starts)
            self._shards.append((ids, starts))
        self._firsts = np.cumsum([0, *(len(starts) - 1 for _, starts in self._shards)])
        self.documents = int(self._firsts[-1])
        self.tokens = sum(int(starts[-1]) for _, starts in self._shards)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, int64 [length], ending with its end token."""
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        ids, starts = self._shards[shard]
        position = index - int(self._firsts[shard])
        return ids[starts[position] : starts[position + 1]].astype(np.int64)

    def lengths(self) -> np.ndarray:
        """The length of every document in tokens, int64 [documents]."""
        parts = [np.diff(starts) for _, starts in self._shards]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def shard_counts(path: Path) -> tuple[int, int]:
    """The documents and tokens of a shard; raises `UserError` if it is not a complete shard."""
    ids, starts = _open(path)
    return len(starts) - 1, len(ids)


def _open(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.stat().st_size < HEADER.size:
        raise UserError(f"{path} is not a token shard: it is shorter than a header")
    data = np.memmap(path, np.uint8, mode="r")
    magic, version, width, _, _, documents, tokens = HEADER.unpack(data[: HEADER.size].tobytes())
    if magic != MAGIC or version != SHARD_VERSION or width not in (2, 4):
        raise UserError(f"{path} is not a token shard of version {SHARD_VERSION}")
    end = HEADER.size + tokens * width
    index = end + -end % 8
    if len(data) != index + 8 * (documents + 1):
        raise UserError(
            f"{path} is truncated or not a shard: it has {len(data)} bytes, which its header "
            "contradicts"
        )
    return data[HEADER.size : end].view(f"<u{width}"), data[index:].view("<i8")


def _check_counts(path: Path, shard: TokenShard, ids: np.ndarray, starts: np.ndarray) -> None:
    if starts[0] != 0 or starts[-1] != len(ids) or (np.diff(starts) < 0).any():
        raise UserError(f"{path}: its document index does not match its {len(ids)} tokens")
    counts = {"documents": (len(starts) - 1, shard.documents), "tokens": (len(ids), shard.tokens)}
    wrong = [
        f"{actual} {name}, but its manifest says {recorded}"
        for name, (actual, recorded) in counts.items()
        if recorded not in (None, actual)
    ]
    if wrong:
        raise UserError(f"{path} has {' and '.join(wrong)}; tokenize the corpus again")
