"""Cleans records: each becomes a row that is kept or a drop with its reason.

Several processes share the work where that pays. The result for a record depends only on the record
and the settings, so the number of processes and their timing change nothing.
"""

import collections
import contextlib
import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, NamedTuple, Self

from nudge.components.common.artifacts.corpus import text_sha256
from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.core import workers
from nudge.components.common.core.environment import usable_cores
from nudge.components.common.core.errors import UserError
from nudge.components.common.readers import Page, Record, Unreadable
from nudge.components.common.readers.records import characters
from nudge.components.ingest import conversations
from nudge.components.ingest.duplicates import BUCKETS, Documents, signature, word_hashes
from nudge.components.ingest.filters import Filter, make_filters, normalize
from nudge.components.ingest.overlap import Overlap
from nudge.components.ingest.pieces import pieces
from nudge.components.ingest.settings import IngestSettings

SAMPLES, SAMPLE_CHARACTERS = 5, 120
EVALUATED = "overlaps_evaluation"
"""The reason to drop a training document that shares text with a guard or a test."""
BATCH_BYTES, BATCH_RECORDS = 1 << 20, 1000
ALONE_BYTES = 8 << 20
"""This much text is cleaned in this process before others are started; starting them takes a
second."""
PAGE_WORK = 8
"""One byte of a web page or a PDF takes about as long as this many bytes of plain text."""
AHEAD_BYTES = 32 << 20
"""At most this much text waits for other processes; reading pauses until some of it is done."""


class Row(NamedTuple):
    """A clean document; ``share`` is the keyed hash of its text, in [0, 1)."""

    id: str
    text: str
    license: str
    origin: str
    sha256: str
    share: float
    raw_bytes: int
    bytes: int
    keys: tuple[int, ...]
    turns: tuple[int, ...] | None = None
    """For a conversation, whose JSON is the text: hashes of its user side and of its first user
    turn, and the latter's `signature`."""


class Drop(NamedTuple):
    """A record that is left out; ``raw_bytes`` is the size of its text or unreadable bytes."""

    reason: str
    raw_bytes: int
    sample: str
    detail: str


def share_of(text: str, settings: IngestSettings) -> float:
    """The keyed hash of a text, in [0, 1); below ``validation_share`` the text is held out.

    A document stays in its split as the corpus grows, for as long as its text does not change.
    """
    digest = hmac.digest(str(settings.split_seed).encode(), text.encode(), "sha256")
    return int.from_bytes(digest[:8]) / 2**64


def clean_all(
    record: Record, filters: list[Filter], settings: IngestSettings, keep_out: Overlap
) -> list[Row | Drop]:
    """The results for one record; settings may split a long text into several documents."""
    most = settings.split_characters
    if not most:
        return [clean(record, filters, settings, keep_out)]
    if isinstance(record.text, Page):
        record = record._replace(text=record.text.text())
    if not isinstance(record.text, str) or len(record.text) <= most:
        return [clean(record, filters, settings, keep_out)]
    parts = pieces(normalize(record.text), most)
    named = (record._replace(name=f"{record.name}:{n}", text=t) for n, t in enumerate(parts, 1))
    return [clean(each, filters, settings, keep_out) for each in named]


def clean(
    record: Record, filters: list[Filter], settings: IngestSettings, keep_out: Overlap
) -> Row | Drop:
    """The result for one record; a training document with text to ``keep_out`` is dropped."""
    if isinstance(record.text, Conversation):
        return _conversation(record, record.text, settings, keep_out)
    raw = record.text.text() if isinstance(record.text, Page) else record.text
    text: str | Unreadable = raw
    size = raw.bytes if isinstance(raw, Unreadable) else len(raw.encode("utf-8", "replace"))
    if isinstance(raw, str):
        is_text = settings.format != "chat"
        text = normalize(raw) if is_text else Unreadable("not_a_conversation", "a text")
    for apply in filters:
        if not isinstance(text, str):
            break
        text = apply(text)
    if isinstance(text, str) and not text:
        text = Unreadable("too_short")
    name = normalize(record.name)
    if not isinstance(text, str):
        excerpt = raw[:SAMPLE_CHARACTERS] if isinstance(raw, str) else text.detail
        return Drop(text.reason, size, f"{name}: {normalize(excerpt)}", text.detail)
    share = share_of(text, settings)
    keys: tuple[int, ...] = (0,) * BUCKETS
    if settings.near_duplicates or keep_out.grams:
        words = word_hashes(text)
        if share >= settings.validation_share and keep_out.is_in(words):
            return Drop(EVALUATED, size, f"{name}: {text[:SAMPLE_CHARACTERS]}", "")
        if settings.near_duplicates:
            keys = tuple(signature(words))
    return Row(
        name,
        text,
        normalize(record.license),
        normalize(record.origin),
        text_sha256(text),
        share,
        size,
        len(text.encode()),
        keys,
    )


def _conversation(
    record: Record, raw: Conversation, settings: IngestSettings, keep_out: Overlap
) -> Row | Drop:
    size = len(raw.to_json().encode("utf-8", "replace"))
    found, name = conversations.cleaned(raw, settings), normalize(record.name)
    if isinstance(found, Unreadable):
        excerpt = found.detail or raw.transcript()[:SAMPLE_CHARACTERS]
        return Drop(found.reason, size, f"{name}: {normalize(excerpt)}", found.detail)
    # A conversation like this one may move it from held out to trained on, so its split is unknown.
    if keep_out.grams and keep_out.is_in(word_hashes(found.transcript())):
        return Drop(EVALUATED, size, f"{name}: {found.transcript()[:SAMPLE_CHARACTERS]}", "")
    body, turns = found.to_json(), conversations.turns_of(found, settings)
    return Row(
        name,
        body,
        normalize(record.license),
        normalize(record.origin),
        text_sha256(body),
        turns.share,
        size,
        len(body.encode()),
        conversations.whole_keys(found, settings),
        (turns.user_side, turns.first, *turns.keys),
    )


class Tally:
    """Counts of what one version of an object contains."""

    def __init__(self, number: int, uri: str) -> None:
        self.number, self.uri = number, uri
        self.stored_bytes = self.documents_in = self.text_bytes_in = 0
        self.dropped: Counter[str] = Counter()
        self.dropped_bytes: Counter[str] = Counter()
        self.samples: dict[str, list[str]] = {}
        self.encodings: Counter[str] = Counter()
        self.columns = ""
        self.void = self.lost = False
        self._digest = hashlib.sha256()

    def take(self, result: Row | Drop) -> None:
        """Count one record; records arrive in the order in which they were read."""
        self.documents_in += 1
        self.text_bytes_in += result.raw_bytes
        if isinstance(result, Row):
            self._digest.update(result.sha256.encode())
            return
        self.dropped[result.reason] += 1
        self.dropped_bytes[result.reason] += result.raw_bytes
        if result.reason == "no_column":
            self.columns = self.columns or result.detail
        shown = self.samples.setdefault(result.reason, [])
        if len(shown) < SAMPLES:
            shown.append(f"{self.uri} {result.sample}")

    def facts(self) -> dict[str, Any]:
        """The object's entry in the manifest, plus what only the report shows."""
        return {
            "uri": self.uri,
            "bytes": self.stored_bytes,
            "documents_in": self.documents_in,
            "text_bytes_in": self.text_bytes_in,
            "dropped": dict(self.dropped),
            "dropped_bytes": dict(self.dropped_bytes),
            "sha256": self._digest.hexdigest(),
            "lost": self.lost,
            "columns": self.columns,
            "encodings": dict(self.encodings),
            "samples": self.samples,
        }


Batch = tuple[list[Tally], int, Future[list[list[Row | Drop]]]]
"""Records that other processes clean: their tallies, their size and their results."""


class Cleaner:
    """Cleans records in order and adds the rows that are kept to ``documents``."""

    def __init__(self, settings: IngestSettings, documents: Documents, keep_out: Overlap) -> None:
        self._settings, self._documents, self._keep_out = settings, documents, keep_out
        self._filters = make_filters(settings)
        self._workers = settings.workers or usable_cores()
        self._pool: ProcessPoolExecutor | None = None
        self._batch: list[tuple[Tally, Record]] = []
        self._pending: collections.deque[Batch] = collections.deque()
        self._batched = self._ahead = self._alone = 0
        self.documents_in = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def put(self, tally: Tally, record: Record) -> None:
        """Take one record of an object."""
        self._batch.append((tally, record))
        if record.encoding:
            tally.encodings[record.encoding] += 1
        if isinstance(record.text, Page):
            self._batched += PAGE_WORK * len(record.text.raw)
        else:
            self._batched += characters(record.text)
        if self._batched >= BATCH_BYTES or len(self._batch) >= BATCH_RECORDS:
            self._send()

    def forget(self, tally: Tally) -> None:
        """Remove everything of an object, including records that are still being cleaned."""
        tally.void = True
        self._documents.remove(tally.number)

    def finish(self) -> None:
        """Wait until every record is cleaned."""
        self._send()
        while self._pending:
            self._receive()

    def _send(self) -> None:
        batch, size = self._batch, self._batched
        self._batch, self._batched = [], 0
        tallies, records = [tally for tally, _ in batch], [record for _, record in batch]
        if self._workers == 1 or self._alone < ALONE_BYTES:
            self._alone += size
            for tally, record in batch:
                self._take(tally, clean_all(record, self._filters, self._settings, self._keep_out))
            return
        if self._pool is None:
            self._pool = workers.spawned(self._workers, _begin, self._settings, self._keep_out)
        with self._killed_reported():
            future = self._pool.submit(_clean_batch, records)
        self._pending.append((tallies, size, future))
        self._ahead += size
        while self._ahead > AHEAD_BYTES or len(self._pending) > 4 * self._workers:
            self._receive()

    def _receive(self) -> None:
        tallies, size, future = self._pending.popleft()
        with self._killed_reported():
            results = future.result()
        for tally, result in zip(tallies, results, strict=True):
            self._take(tally, result)
        self._ahead -= size

    @contextlib.contextmanager
    def _killed_reported(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            raise UserError(
                f"one of the {self._workers} cleaning processes was killed, most likely because "
                "memory ran out; give the step more memory (on a cluster: a larger `size`), or "
                "lower ingest.workers"
            ) from None

    def _take(self, tally: Tally, results: list[Row | Drop]) -> None:
        if tally.void:
            return
        for result in results:
            self.documents_in += 1
            if isinstance(result, Row):
                self._documents.add(tally.number, tally.documents_in, result)
            tally.take(result)


_worker: dict[str, Any] = {}


def _begin(settings: IngestSettings, keep_out: Overlap) -> None:
    _worker.update(filters=make_filters(settings), settings=settings, keep_out=keep_out)


def _clean_batch(records: list[Record]) -> list[list[Row | Drop]]:
    return [clean_all(record, **_worker) for record in records]
