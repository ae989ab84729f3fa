"""Token ids of a corpus shard's lines, in this process or in others, without PyTorch and
transformers."""

import collections
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from nudge.components.common.artifacts.corpus import Document, document_of
from nudge.components.common.artifacts.tokens import NO_SPANS, ShardWriter
from nudge.components.common.chat import Refusal
from nudge.components.common.chat.masks import Masked
from nudge.components.common.core import workers
from nudge.components.common.core.errors import UserError
from nudge.components.tokenize.chats import Account, Chat, encoder_of, stacked
from nudge.components.tokenize.ids import exact, ids_of, text_ids

T = TypeVar("T")

BLOCK_BYTES = 1 << 20
"""Text that a process receives at a time: tokenizers needs about a fifth of a second for it."""
WAITING = 3
"""Blocks per process that are read ahead or wait for their turn; this bounds the memory."""


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids: the text of a ``tokenizer.json``, the end-of-document id, the ids'
    dtype, whether to use fastokens (`nudge.components.tokenize.ids`), and for a corpus with
    conversations how they become text."""

    tokenizer: str
    end: int
    dtype: str
    fast: bool = False
    chat: Chat | None = None
    is_control_text: bool = True
    """Whether a control token that a document spells out stays text."""


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents: their ids as bytes of the dtype, and the number of ids of each.

    ``counts``, ``spans``, ``origins`` and ``records`` are those of `ShardWriter.append`;
    ``account`` counts the conversations that were left out or shortened.
    """

    ids: bytes
    lengths: np.ndarray
    counts: np.ndarray
    spans: np.ndarray
    origins: np.ndarray
    records: int
    account: Account = field(default_factory=Account)

    def append_to(self, writer: ShardWriter) -> None:
        """Write the documents."""
        writer.append(self.ids, self.lengths, self.counts, self.spans, self.origins, self.records)


def encode(lines: bytes, encoding: Encoding) -> Encoded:
    """The ids of documents, one per JSON line: of a text followed by the end-of-document id, of a
    conversation with its learned spans.

    Raises `OverflowError` for an id that does not fit the dtype.
    """
    if encoding.chat is not None:
        return _encode_mixed(lines, encoding)
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    documents = _texts(texts, encoding)
    none = np.zeros(len(texts), np.int64)
    return Encoded(*_joined(documents, encoding), none, NO_SPANS, np.arange(len(texts)), len(texts))


def _encode_mixed(lines: bytes, encoding: Encoding) -> Encoded:
    """`encode` for a corpus in which some documents are conversations."""
    assert encoding.chat is not None
    records = [document_of(json.loads(line)) for line in lines.splitlines()]
    texts = {n: r.text for n, r in enumerate(records) if r.conversation is None}
    plain = dict(zip(texts, _texts(list(texts.values()), encoding), strict=True))
    account = Account()
    chats = _chats(records, encoding, account)
    samples: list[Masked] = []
    origins: list[int] = []
    for number in range(len(records)):
        if number in plain:
            of_record = [Masked(plain[number], np.empty((0, 2), np.int64))]
        else:
            of_record = chats.get(number, [])
        samples += of_record
        origins += [number] * len(of_record)
    counts, spans = stacked(samples)
    joined = _joined([sample.ids for sample in samples], encoding)
    return Encoded(*joined, counts, spans, np.array(origins, np.int64), len(records), account)


def _chats(
    records: list[Document], encoding: Encoding, account: Account
) -> dict[int, list[Masked]]:
    """The samples of each conversation that can be learned from, by its number."""
    assert encoding.chat is not None
    encoder = encoder_of(encoding.tokenizer, encoding.chat, encoding.fast)
    wanted = {n: r.conversation for n, r in enumerate(records) if r.conversation is not None}
    made: dict[int, list[Masked]] = {}
    for number, found in encoder.encode(wanted).items():
        samples = found
        if isinstance(samples, list) and not encoder.fits(samples):
            samples = encoder.shortened(wanted[number])
            account.shortened += isinstance(samples, list)
        if isinstance(samples, Refusal):
            account.refuse(records[number].id, records[number].source, samples)
        else:
            made[number] = samples
    return made


def _texts(texts: list[str], encoding: Encoding) -> list[np.ndarray]:
    """The ids of each text, with the end-of-document id."""
    end = np.array([encoding.end], np.uint32)
    encoder = text_ids if encoding.is_control_text else ids_of
    found = encoder(texts, encoding.tokenizer, encoding.fast)
    return [np.concatenate((ids, end)) for ids in found]


def _joined(documents: list[np.ndarray], encoding: Encoding) -> tuple[bytes, np.ndarray]:
    """The ids of all documents as bytes of the dtype, and the number of ids of each."""
    dtype = np.dtype(encoding.dtype)
    ids = np.concatenate(documents) if documents else np.empty(0, np.uint32)
    if len(ids) and ids.max() > np.iinfo(dtype).max:
        raise OverflowError(f"the id {ids.max()} does not fit into {dtype.name}")
    lengths = np.array([len(document) for document in documents], np.int64)
    return ids.astype(dtype).tobytes(), lengths


def encode_all(
    blocks: Iterable[tuple[T, bytes]], encoding: Encoding, processes: int
) -> Iterator[tuple[T, Encoded]]:
    """Each block, encoded, with its mark, in order.

    The number of processes does not change the result. With one, this process does the work, and
    fastokens uses threads here, since it is done before other processes would have started. Raises
    `UserError` if a process is killed.
    """
    if processes == 1 or encoding.fast:
        yield from ((mark, encode(lines, encoding)) for mark, lines in blocks)
        return
    waiting: collections.deque[tuple[T, Future[Encoded]]] = collections.deque()
    # In a file: a pipe buffers 64 KiB, so processes that receive megabytes start one by one.
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(encoding.tokenizer.encode())
        file.flush()
        plain = dataclasses.replace(encoding, tokenizer="")
        pool = workers.spawned(processes, _begin, file.name, plain)
        try:
            for mark, lines in blocks:
                waiting.append((mark, pool.submit(_encode_here, lines)))
                if len(waiting) >= WAITING * processes:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        except BrokenProcessPool:
            raise UserError(
                f"tokenize: one of the {processes} processes was killed, most likely because "
                "memory ran out; give the step more memory (on a cluster: a larger `size`), or "
                "lower tokenize.processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_encoding: Encoding


def _begin(tokenizer: str, plain: Encoding) -> None:
    global _encoding
    _encoding = dataclasses.replace(plain, tokenizer=Path(tokenizer).read_text(encoding="utf-8"))
    exact(_encoding.tokenizer)


def _encode_here(lines: bytes) -> Encoded:
    return encode(lines, _encoding)
