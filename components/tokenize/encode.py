"""Token ids of a corpus shard's lines, in this process or in others, without PyTorch and
transformers."""

import collections
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from nudge.components.common.core import workers
from nudge.components.common.core.errors import UserError
from nudge.components.tokenize.ids import exact, ids_of

T = TypeVar("T")

BLOCK_BYTES = 1 << 20
"""Text that a process receives at a time: tokenizers needs about a fifth of a second for it."""
WAITING = 3
"""Blocks per process that are read ahead or wait for their turn; this bounds the memory."""


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids: the text of a ``tokenizer.json``, the end-of-document id, the ids'
    dtype, and whether to use fastokens (`nudge.components.tokenize.ids`)."""

    tokenizer: str
    end: int
    dtype: str
    fast: bool = False


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents: their ids as bytes of the dtype, and the number of ids of each."""

    ids: bytes
    lengths: np.ndarray


def encode(lines: bytes, encoding: Encoding) -> Encoded:
    """The ids of documents (one per JSON line), each followed by the end-of-document id.

    Raises `OverflowError` for an id that does not fit the dtype.
    """
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    found = ids_of(texts, encoding.tokenizer, encoding.fast)
    end, dtype = np.array([encoding.end], np.uint32), np.dtype(encoding.dtype)
    ids = np.concatenate([part for document in found for part in (document, end)])
    if ids.max() > np.iinfo(dtype).max:
        raise OverflowError(f"the id {ids.max()} does not fit into {dtype.name}")
    lengths = np.array([len(document) + 1 for document in found], np.int64)
    return Encoded(ids.astype(dtype).tobytes(), lengths)


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
        pool = workers.spawned(processes, _begin, file.name, encoding.end, encoding.dtype)
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
                "memory ran out; give the step more memory, or lower tokenize.processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_encoding: Encoding


def _begin(tokenizer: str, end: int, dtype: str) -> None:
    global _encoding
    _encoding = Encoding(Path(tokenizer).read_text(encoding="utf-8"), end, dtype)
    exact(_encoding.tokenizer)


def _encode_here(lines: bytes) -> Encoded:
    return encode(lines, _encoding)
