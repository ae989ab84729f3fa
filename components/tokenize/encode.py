"""Token ids of a corpus shard's lines, in processes that import neither PyTorch nor transformers.

One process makes about 3 to 6 MB/s with the tokenizer's own threads off, and processes scale where
those threads do not (huggingface/tokenizers#1900).
"""

import array
import collections
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from nudge.components.common import workers
from nudge.components.common.errors import UserError
from tokenizers import Tokenizer

T = TypeVar("T")

BLOCK_BYTES = 1 << 20
"""Text that a process is handed at a time: a fifth of a second's work."""
CACHED_WORDS = 1 << 17
"""Words whose tokens a process remembers; the library's own 10,000 are full after a few MB of text,
and none gives way."""
WAITING = 3
"""Blocks a process that are read ahead or wait for their turn; they bound the memory."""


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids: a ``tokenizer.json``, the id that ends a document, the ids' dtype."""

    tokenizer: str
    end: int
    dtype: str


@dataclass(frozen=True)
class Encoded:
    """Documents one after another: their ids as bytes of the dtype, and how many each has."""

    ids: bytes
    lengths: np.ndarray


def encode(lines: bytes, encoding: Encoding) -> Encoded:
    """The ids of documents, a JSON line each, every one with its end token.

    Raises `OverflowError` for an id that the dtype cannot hold.
    """
    tokenizer = _loaded(encoding.tokenizer)
    ids = array.array("H" if np.dtype(encoding.dtype).itemsize == 2 else "I")
    ends = []
    for line in lines.splitlines():
        # One document at a time: what the tokenizer notes beside each id is many times its size.
        [found] = tokenizer.encode_batch_fast([json.loads(line)["text"]], add_special_tokens=False)
        ids.extend(found.ids)
        ids.append(encoding.end)
        ends.append(len(ids))
    if sys.byteorder == "big":
        ids.byteswap()
    return Encoded(ids.tobytes(), np.diff(ends, prepend=0))


def encode_all(
    blocks: Iterable[tuple[T, bytes]], encoding: Encoding, processes: int
) -> Iterator[tuple[T, Encoded]]:
    """Each block with its mark, encoded, in the order in which they come.

    The result does not depend on the number of processes; one works in this process itself. Raises
    `UserError` if a process is killed.
    """
    if processes == 1:
        yield from ((mark, encode(lines, encoding)) for mark, lines in blocks)
        return
    waiting: collections.deque[tuple[T, Future[Encoded]]] = collections.deque()
    # In a file, since a pipe holds 64 KiB: processes that are handed megabytes start one by one.
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
                f"tokenize: one of its {processes} processes was killed, most often because memory "
                "ran out; give the step more memory, or fewer processes with tokenize.processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=1)
def _loaded(text: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # BPE and Unigram have it; text of a natural vocabulary goes through about 10 % faster.
    if hasattr(tokenizer.model, "_resize_cache"):
        tokenizer.model._resize_cache(CACHED_WORDS)
    return tokenizer


_encoding: Encoding


def _begin(tokenizer: str, end: int, dtype: str) -> None:
    global _encoding
    _encoding = Encoding(Path(tokenizer).read_text(encoding="utf-8"), end, dtype)
    _loaded(_encoding.tokenizer)


def _encode_here(lines: bytes) -> Encoded:
    return encode(lines, _encoding)
