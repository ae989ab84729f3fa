"""The tokens artifact: token shards with an index of documents, and the tokenizer beside them.

A shard is one file, little-endian:

| bytes | what |
|---|---|
| 8 | magic ``NUDGETOK`` |
| 4 x uint32 | version, bytes a token (2 or 4), two zeros |
| 2 x uint64 | documents, tokens |
| tokens x uint16 or uint32 | the documents one after another, each with its end token |
| padding to a multiple of 8 | zeros |
| (documents + 1) x int64 | where each document begins, in tokens; last, their number |

``manifest.json`` (nudge.tokens, version 1) holds each shard's sha256, vocabulary, tokenizer hash.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
from nudge.components.common.errors import UserError
from nudge.components.common.publish import read_manifest, verify_file

FORMAT, VERSION = "nudge.tokens", 1
MAGIC = b"NUDGETOK"
HEADER = struct.Struct("<8sIIIIQQ")
SHARD_VERSION = 1
END_OF_DOCUMENT = "<|endoftext|>"


def read_tokens_manifest(tokens: Path) -> dict[str, Any]:
    """The manifest of a tokens artifact; raises `UserError` if the folder is none."""
    return read_manifest(tokens / "manifest.json", FORMAT, VERSION)


def end_of_document_id(tokenizer: Any) -> int:
    """The token that ends a document: ``<|endoftext|>`` if the tokenizer has it, else its EOS."""
    known = tokenizer.get_vocab()
    name = END_OF_DOCUMENT if END_OF_DOCUMENT in known else tokenizer.eos_token
    if name is None:
        raise UserError("the tokenizer has no end-of-document token: neither <|endoftext|> nor EOS")
    return int(known[name])


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id of the vocabulary fits, else uint32 (both little-endian)."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(path: Path, documents: list[np.ndarray], dtype: np.dtype[Any]) -> None:
    """Write documents, each an integer array of ids, as one shard; ids must fit ``dtype``."""
    starts = np.zeros(len(documents) + 1, "<i8")
    np.cumsum([len(document) for document in documents], out=starts[1:])
    with path.open("wb") as file:
        counts = (len(documents), int(starts[-1]))
        file.write(HEADER.pack(MAGIC, SHARD_VERSION, dtype.itemsize, 0, 0, *counts))
        for document in documents:
            assert document.size == 0 or int(document.max()) <= np.iinfo(dtype).max
            file.write(document.astype(dtype).tobytes())
        file.write(bytes(-file.tell() % 8))
        file.write(starts.tobytes())


class TokenReader:
    """The documents of a split, memory-mapped; shards are checked by sha256 when it is made.

    Raises `UserError` if a shard is missing, damaged or of another format.
    """

    def __init__(self, tokens: Path, split: str) -> None:
        self.manifest = read_tokens_manifest(tokens)
        self._shards: list[tuple[np.ndarray, np.ndarray]] = []
        shards = self.manifest["splits"][split]["shards"]
        self.sha256 = hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest()
        for shard in shards:
            path = tokens / shard["file"]
            verify_file(path, shard["sha256"])
            self._shards.append(_open(path))
        self._firsts = np.cumsum([0, *(len(starts) - 1 for _, starts in self._shards)])
        self.documents = int(self._firsts[-1])
        self.tokens = sum(int(starts[-1]) for _, starts in self._shards)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, int64 [length], its end token last."""
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        ids, starts = self._shards[shard]
        place = index - int(self._firsts[shard])
        return ids[starts[place] : starts[place + 1]].astype(np.int64)

    def lengths(self) -> np.ndarray:
        """The length of every document in tokens, int64 [documents]."""
        parts = [np.diff(starts) for _, starts in self._shards]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _open(path: Path) -> tuple[np.ndarray, np.ndarray]:
    whole = np.memmap(path, np.uint8, mode="r")
    if len(whole) < HEADER.size:
        raise UserError(f"{path} is no token shard: it is shorter than a header")
    magic, version, width, _, _, documents, tokens = HEADER.unpack(whole[: HEADER.size].tobytes())
    if magic != MAGIC or version != SHARD_VERSION or width not in (2, 4):
        raise UserError(f"{path} is no token shard of version {SHARD_VERSION}")
    end = HEADER.size + tokens * width
    index = end + -end % 8
    if len(whole) != index + 8 * (documents + 1):
        raise UserError(f"{path} is cut short: {len(whole)} bytes, its header promises more")
    return whole[HEADER.size : end].view(f"<u{width}"), whole[index:].view("<i8")
