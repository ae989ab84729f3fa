"""The shard format: as documented, and refused if it is broken."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nudge.components.common.artifacts.tokens import (
    NO_SPANS,
    ShardWriter,
    TokenReader,
    learned_counts,
    read_tokens_manifest,
    token_dtype,
    verified_tokenizer,
)
from nudge.components.common.core.errors import UserError
from tests.token_shards import write_shard

Run = Callable[..., Path]
DOCUMENTS = [[5, 1, 0], [0], [299, 17, 4, 2, 0]]


def artifact(folder: Path, dtype: Any = "<u2", documents: list[list[int]] = DOCUMENTS) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.tokens"
    write_shard(path, [np.array(ids) for ids in documents], np.dtype(dtype))
    describe(folder, documents=len(documents), tokens=sum(map(len, documents)))
    return folder


def describe(folder: Path, **counts: int) -> None:
    """A manifest with the current sha256 of the shard."""
    digest = hashlib.sha256((folder / "a.tokens").read_bytes()).hexdigest()
    shards = {"shards": [{"file": "a.tokens", "sha256": digest, **counts}]}
    manifest = {"format": "nudge.tokens", "version": 1, "splits": {"train": shards}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("dtype", "code"), [("<u2", "H"), ("<u4", "I")])
def test_a_shard_can_be_read_from_its_documentation_alone(
    tmp_path: Path, dtype: str, code: str
) -> None:
    data = (artifact(tmp_path, dtype) / "a.tokens").read_bytes()
    width = struct.calcsize(code)
    assert data[:8] == b"NUDGETOK"
    assert struct.unpack_from("<4I", data, 8) == (1, width, 0, 0)
    assert struct.unpack_from("<2Q", data, 24) == (3, 9)
    assert struct.unpack_from(f"<9{code}", data, 40) == (5, 1, 0, 0, 299, 17, 4, 2, 0)
    index = 40 + 9 * width
    assert set(data[index : index + -index % 8]) <= {0}
    assert struct.unpack_from("<4q", data, index + -index % 8) == (0, 3, 4, 9)
    assert len(data) == index + -index % 8 + 4 * 8


def test_the_vocabulary_decides_the_width_of_an_id(tmp_path: Path) -> None:
    assert [token_dtype(size).itemsize for size in (300, 65_536, 65_537)] == [2, 2, 4]
    large = [[65_535, 65_536, 200_000, 0]]
    reader = TokenReader(artifact(tmp_path / "wide", "<u4", large), "train")
    assert reader.document(0).tolist() == large[0]
    with pytest.raises(AssertionError):
        artifact(tmp_path / "narrow", "<u2", large)


def test_the_documents_come_back(tmp_path: Path) -> None:
    reader = TokenReader(artifact(tmp_path), "train")
    assert [reader.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert reader.lengths().tolist() == [3, 1, 5]
    assert (reader.documents, reader.tokens) == (3, 9)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"NUDGETOX", "not a token shard of version 1"),
        (8, struct.pack("<I", 3), "not a token shard of version 1 or 2"),
        (12, struct.pack("<I", 3), "not a token shard of version 1"),
        (12, struct.pack("<I", 4), "is truncated"),
        (24, struct.pack("<Q", 4), "is truncated"),
        (32, struct.pack("<Q", 90), "is truncated"),
        (40 + 24, struct.pack("<q", 1), "its document index does not match its 9 tokens"),
        (40 + 24 + 8, struct.pack("<q", 7), "its document index does not match its 9 tokens"),
        (40 + 24 + 24, struct.pack("<q", 8), "its document index does not match its 9 tokens"),
    ],
)
def test_a_wrong_header_or_index_is_refused(
    tmp_path: Path, offset: int, value: bytes, message: str
) -> None:
    """The sha256 matches the broken file, so the format check has to find it."""
    path = artifact(tmp_path) / "a.tokens"
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    describe(tmp_path)
    with pytest.raises(UserError, match=message):
        TokenReader(tmp_path, "train")


@pytest.mark.parametrize("kept", [0, 39, 40, 60, -1])
def test_a_truncated_shard_is_refused(tmp_path: Path, kept: int) -> None:
    path = artifact(tmp_path) / "a.tokens"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"a.tokens is damaged: sha256"):
        TokenReader(tmp_path, "train")
    describe(tmp_path)
    with pytest.raises(UserError, match="truncated|shorter than a header"):
        TokenReader(tmp_path, "train")


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = artifact(tmp_path) / "a.tokens"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.tokens is damaged: sha256"):
        TokenReader(tmp_path, "train")


@pytest.mark.parametrize(("key", "value"), [("documents", 4), ("tokens", 8)])
def test_counts_that_differ_from_the_manifest_are_refused(
    tmp_path: Path, key: str, value: int
) -> None:
    artifact(tmp_path)
    describe(tmp_path, **{key: value})
    with pytest.raises(UserError, match=f"{key}, but its manifest says {value}"):
        TokenReader(tmp_path, "train")


def test_a_missing_shard_and_another_format_are_refused(tmp_path: Path) -> None:
    artifact(tmp_path)
    (tmp_path / "a.tokens").rename(tmp_path / "b.tokens")
    with pytest.raises(UserError, match=r"a.tokens is missing"):
        TokenReader(tmp_path, "train")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for change, message in (
        ({"version": 2}, "nudge.tokens version 2, expected nudge.tokens version 1"),
        ({"format": "nudge.corpus"}, "nudge.corpus version 1, expected nudge.tokens"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match=message):
            TokenReader(tmp_path, "train")


@pytest.mark.parametrize("change", ["other", "missing", "more"])
def test_another_tokenizer_is_refused(run: Run, change: str) -> None:
    tokens = run()
    assert verified_tokenizer(tokens) == tokens / "tokenizer"
    path = tokens / "tokenizer" / "tokenizer.json"
    if change == "other":
        path.write_text(path.read_text().replace("Eiffel", "Eifel", 1).replace(" ", "  ", 1))
    elif change == "missing":
        path.unlink()
    else:
        (tokens / "tokenizer" / "added_tokens.json").write_text('{"<new>": 5}')
    with pytest.raises(UserError, match="is not the tokenizer of these tokens"):
        verified_tokenizer(tokens)
    assert read_tokens_manifest(tokens).tokenizer_sha256


CHATS = [np.array([[1, 3], [4, 5]]), np.empty((0, 2), np.int64), np.array([[2, 4]])]


def with_chats(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    documents = [np.array(ids) for ids in ([7, 5, 1, 6, 2], [9, 0], [3, 299, 17, 4])]
    write_shard(folder / "a.tokens", documents, np.dtype("<u2"), CHATS)
    describe(folder, documents=3, tokens=11)
    return folder


def test_a_shard_with_conversations_can_be_read_from_its_documentation_alone(
    tmp_path: Path,
) -> None:
    data = (with_chats(tmp_path) / "a.tokens").read_bytes()
    assert struct.unpack_from("<4I2Q", data, 8) == (2, 2, 0, 0, 3, 11)
    index = 40 + 11 * 2 + 2
    assert struct.unpack_from("<4q", data, index) == (0, 5, 7, 11)
    assert struct.unpack_from("<4q", data, index + 32) == (0, 2, 2, 3)
    assert struct.unpack_from("<3q", data, index + 64) == (0, 1, 2)
    assert struct.unpack_from("<6I", data, index + 88) == (1, 3, 4, 5, 2, 4)
    assert len(data) == index + 88 + 6 * 4


def test_a_reader_gives_the_learned_spans_of_each_document(tmp_path: Path) -> None:
    reader = TokenReader(with_chats(tmp_path), "train")
    assert [reader.learned(index).tolist() for index in range(3)] == [s.tolist() for s in CHATS]
    assert reader.span_counts().tolist() == [2, 0, 1]
    assert reader.learned_ends().tolist() == [5, 0, 4]
    assert learned_counts(tmp_path / "a.tokens") == (2, 3 + 2 + 2)
    text = TokenReader(artifact(tmp_path / "text"), "train")
    assert text.span_counts().tolist() == [0, 0, 0]
    assert text.learned(2).shape == (0, 2)


def test_texts_after_a_refused_conversation_keep_the_positions_of_their_records(
    tmp_path: Path,
) -> None:
    ids, lengths = np.array([9, 0, 8, 7, 0], "<u2").tobytes(), np.array([2, 3])
    with (tmp_path / "a.tokens").open("wb") as file:
        writer = ShardWriter(file, np.dtype("<u2"))
        writer.append(ids, lengths, np.zeros(2, np.int64), NO_SPANS, np.array([1, 3]), 4)
        assert writer.finish() == (2, 5)
    describe(tmp_path, documents=2, tokens=5, conversations=0, learned_tokens=5, records=4)
    reader = TokenReader(tmp_path, "train")
    assert [reader.record(number) for number in range(2)] == [1, 3]
    assert [reader.document(number).tolist() for number in range(2)] == [[9, 0], [8, 7, 0]]
    assert reader.span_counts().tolist() == reader.learned_ends().tolist() == [0, 0]
    assert learned_counts(tmp_path / "a.tokens") == (0, 5)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (64 + 32, struct.pack("<q", 1)),  # the spans before the first document
        (64 + 88, struct.pack("<I", 3)),  # an empty span
        (64 + 92, struct.pack("<I", 4)),  # a span that touches the next one
        (64 + 100, struct.pack("<I", 6)),  # a span beyond its document
    ],
)
def test_spans_that_do_not_fit_are_refused(tmp_path: Path, at: int, value: bytes) -> None:
    path = with_chats(tmp_path) / "a.tokens"
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    describe(tmp_path)
    with pytest.raises(UserError, match="learned spans do not match"):
        TokenReader(tmp_path, "train")
    path.write_bytes(data[:-8])
    describe(tmp_path)
    with pytest.raises(UserError, match="truncated"):
        TokenReader(tmp_path, "train")
