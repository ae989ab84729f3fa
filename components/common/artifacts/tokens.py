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

Version 2 adds the loss mask and the records. It is written if the shard has a conversation, or if a
text follows a conversation that was left out:

| bytes | what |
|---|---|
| (documents + 1) x int64 | the number of learned spans before each document; last, of all spans |
| documents x int64 | the position of the corpus shard's record that the document is from |
| spans x 2 x uint32 | the first token of a span and the one after its last, in the document |

One record may give several documents, or none. A document without spans is text: the model learns
every token, and it ends with the end token. A conversation has one span or more, has no end token,
and only the tokens in its spans are learned.

``manifest.json`` (nudge.tokens, version 1) has each shard's sha256 and counts, the tokenizer's
sha256, its end-of-document id and, for conversations, the template.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from nudge.components.common.artifacts.chat_facts import ChatFacts
from nudge.components.common.artifacts.schema import Omitted, read_artifact, write_artifact
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_tree, verify_file

MANIFEST = "manifest.json"
MAGIC = b"NUDGETOK"
HEADER = struct.Struct("<8sIIIIQQ")
TEXT_VERSION, CHAT_VERSION = 1, 2


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """One file of a split; the counts are None where they were not recorded."""

    file: str
    sha256: str
    documents: Omitted[int] = None
    tokens: Omitted[int] = None
    conversations: Omitted[int] = None
    learned_tokens: Omitted[int] = None
    records: Omitted[int] = None
    """Of the corpus shard; None if each of them is one document."""


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    shards: tuple[TokenShard, ...]
    documents: Omitted[int] = None
    tokens: Omitted[int] = None
    conversations: Omitted[int] = None
    """Documents that are conversations; None if there are none."""
    learned_tokens: Omitted[int] = None
    """Tokens that the loss counts; None without conversations, because then all of them count."""
    dropped: Omitted[dict[str, int]] = None
    """Conversations that were left out, by reason."""


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
    chat: Omitted[ChatFacts] = None
    """None for a corpus without conversations."""


def read_tokens_manifest(tokens: Path) -> Tokens:
    """The manifest of a tokens artifact; raises `UserError` if the folder has none."""
    return read_artifact(tokens / MANIFEST, Tokens)


def write_tokens_manifest(tokens: Path, manifest: Tokens) -> None:
    """Write the manifest of a tokens artifact."""
    write_artifact(tokens / MANIFEST, manifest)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 if every id of the vocabulary fits, else uint32; both little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


NO_SPANS: np.ndarray = np.empty((0, 2), np.uint32)


class ShardWriter:
    """Writes a shard as its documents arrive; only the index stays in memory: 8 bytes per document,
    or 16 and 8 per learned span if there are conversations."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file, self._dtype = file, dtype
        self._lengths: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._spans: list[np.ndarray] = [NO_SPANS]
        self._origins: list[np.ndarray] = [np.empty(0, np.int64)]
        self.records = 0
        file.write(bytes(HEADER.size))  # without the magic, so a file cut off here is not a shard

    def append(
        self,
        ids: bytes,
        lengths: np.ndarray,
        counts: np.ndarray | None = None,
        spans: np.ndarray = NO_SPANS,
        origins: np.ndarray | None = None,
        records: int = 0,
    ) -> None:
        """Add documents: their concatenated ids in the dtype, and the length of each.

        ``counts`` [documents] is the number of learned spans of each document, 0 for text, and
        ``spans`` [spans, 2] has them in this order. None means that all documents are text.
        ``origins`` [documents] are the positions of their records among the next ``records``
        records of the corpus shard; None means that each document is the next record.
        """
        if counts is None:
            counts = np.zeros(len(lengths), np.int64)
        if origins is None:
            origins, records = np.arange(len(lengths)), len(lengths)
        assert len(ids) == int(lengths.sum()) * self._dtype.itemsize
        assert len(counts) == len(lengths)
        assert int(counts.sum()) == len(spans)
        self._file.write(ids)
        self._lengths.append(lengths)
        self._counts.append(counts)
        self._spans.append(spans)
        self._origins.append(origins + self.records)
        self.records += records

    def finish(self) -> tuple[int, int]:
        """Write index and header; returns the number of documents and of tokens."""
        starts, firsts = _offsets(self._lengths), _offsets(self._counts)
        origins = np.concatenate(self._origins)
        documents, tokens = len(starts) - 1, int(starts[-1])
        self._file.write(bytes(-self._file.tell() % 8))
        self._file.write(starts.tobytes())
        is_text = not firsts[-1] and np.array_equal(origins, np.arange(documents))
        version = TEXT_VERSION if is_text else CHAT_VERSION
        if version == CHAT_VERSION:
            self._file.write(firsts.tobytes())
            self._file.write(origins.astype("<i8").tobytes())
            self._file.write(np.concatenate(self._spans).astype("<u4").tobytes())
        self._file.seek(0)
        width = self._dtype.itemsize
        self._file.write(HEADER.pack(MAGIC, version, width, 0, 0, documents, tokens))
        return documents, tokens


def _offsets(counts: list[np.ndarray]) -> np.ndarray:
    """The sum of the counts before each document and, last, of all; int64 [documents + 1]."""
    return np.cumsum(np.concatenate([np.zeros(1, "<i8"), *counts]), dtype="<i8")


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
        self._shards: list[_Shard] = []
        shards = self.manifest.splits[split].shards
        self.sha256 = hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest()
        for shard in shards:
            path = tokens / shard.file
            verify_file(path, shard.sha256)
            opened = _open(path)
            _check_counts(path, shard, opened.ids, opened.starts)
            _check_spans(path, opened)
            self._shards.append(opened)
        self._firsts = np.cumsum([0, *(len(shard.starts) - 1 for shard in self._shards)])
        counts = zip(shards, self._shards, strict=True)
        records = [shard.records or len(opened.starts) - 1 for shard, opened in counts]
        self._first_records = np.cumsum([0, *records])
        self.documents = int(self._firsts[-1])
        self.tokens = sum(int(shard.starts[-1]) for shard in self._shards)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, int64 [length]; that of a text ends with its end token."""
        _, shard, position = self._find(index)
        return shard.ids[shard.starts[position] : shard.starts[position + 1]].astype(np.int64)

    def learned(self, index: int) -> np.ndarray:
        """The learned spans of one document, int64 [spans, 2]; none for text, which is learned in
        full."""
        _, shard, position = self._find(index)
        return shard.spans[shard.firsts[position] : shard.firsts[position + 1]].astype(np.int64)

    def record(self, index: int) -> int:
        """The position, in the corpus' split, of the record that a document is from."""
        number, shard, position = self._find(index)
        inside = int(shard.origins[position]) if len(shard.origins) else position
        return int(self._first_records[number]) + inside

    def lengths(self) -> np.ndarray:
        """The length of every document in tokens, int64 [documents]."""
        return _joined([np.diff(shard.starts) for shard in self._shards])

    def span_counts(self) -> np.ndarray:
        """The number of learned spans of every document, int64 [documents]; 0 for text."""
        return _joined([np.diff(shard.firsts) for shard in self._shards])

    def learned_ends(self) -> np.ndarray:
        """The end of the last learned span of every document, int64 [documents]; 0 for text."""
        parts = []
        for shard in self._shards:
            ends = np.zeros(len(shard.starts) - 1, np.int64)
            chats = np.diff(shard.firsts) > 0
            ends[chats] = shard.spans[shard.firsts[1:][chats] - 1, 1]
            parts.append(ends)
        return _joined(parts)

    def _find(self, index: int) -> "tuple[int, _Shard, int]":
        """The number of a document's shard, the shard, and the document's position in it."""
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return number, self._shards[number], index - int(self._firsts[number])


def shard_counts(path: Path) -> tuple[int, int]:
    """The documents and tokens of a shard; raises `UserError` if it is not a complete shard."""
    shard = _open(path)
    return len(shard.starts) - 1, len(shard.ids)


def learned_counts(path: Path) -> tuple[int, int]:
    """The conversations and learned tokens of a shard; raises `UserError` as `shard_counts`."""
    shard = _open(path)
    chats = np.diff(shard.firsts) > 0
    texts = int(np.diff(shard.starts)[~chats].sum())
    spans = shard.spans.astype(np.int64)
    return int(chats.sum()), texts + int((spans[:, 1] - spans[:, 0]).sum())


class _Shard(NamedTuple):
    """The arrays of one file: ids, document offsets, span offsets, spans [spans, 2], and the
    records' positions (empty if each document is the next record)."""

    ids: np.ndarray
    starts: np.ndarray
    firsts: np.ndarray
    spans: np.ndarray
    origins: np.ndarray


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _open(path: Path) -> _Shard:
    if path.stat().st_size < HEADER.size:
        raise UserError(f"{path} is not a token shard: it is shorter than a header")
    data = np.memmap(path, np.uint8, mode="r")
    magic, version, width, _, _, documents, tokens = HEADER.unpack(data[: HEADER.size].tobytes())
    if magic != MAGIC or version not in (TEXT_VERSION, CHAT_VERSION) or width not in (2, 4):
        raise UserError(f"{path} is not a token shard of version {TEXT_VERSION} or {CHAT_VERSION}")
    end = HEADER.size + tokens * width
    index = end + -end % 8
    after = index + 8 * (documents + 1)
    firsts, spans, size = np.zeros(documents + 1, np.int64), NO_SPANS, after
    origins = np.empty(0, np.int64)
    if version == CHAT_VERSION:
        middle = after + 8 * (documents + 1)
        size = middle + 8 * documents
        if len(data) >= size:
            firsts, origins = data[after:middle].view("<i8"), data[middle:size].view("<i8")
            spans = data[size:]
            size += 8 * int(firsts[-1])
    if len(data) != size:
        raise UserError(
            f"{path} is truncated or not a shard: it has {len(data)} bytes, which its header "
            "contradicts"
        )
    if version == CHAT_VERSION:
        spans = spans.view("<u4").reshape(-1, 2)
    starts = data[index:after].view("<i8")
    return _Shard(data[HEADER.size : end].view(f"<u{width}"), starts, firsts, spans, origins)


def _check_spans(path: Path, shard: _Shard) -> None:
    """Raise `UserError` unless spans are in order, not empty, apart, and inside their documents."""
    spans, counts = shard.spans.astype(np.int64), np.diff(shard.firsts)
    ordered = shard.firsts[0] == 0 and (counts >= 0).all() and shard.firsts[-1] == len(spans)
    if ordered and len(spans):
        owners = np.repeat(np.arange(len(counts)), counts)
        inside = spans[:, 1] <= np.diff(shard.starts)[owners]
        apart = (owners[1:] != owners[:-1]) | (spans[1:, 0] > spans[:-1, 1])
        ordered = bool(inside.all() and apart.all() and (spans[:, 0] < spans[:, 1]).all())
    if not ordered:
        raise UserError(f"{path}: its learned spans do not match its documents")


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
