"""Feeds objects to the cleaner in order, and fetches small ones ahead of their turn.

A store answers many concurrent requests as fast as one. So several small objects are fetched at a
time while earlier ones are parsed; the order of the objects does not change.
"""

import collections
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from nudge.components.common.core.progress import Progress
from nudge.components.common.readers import Record, Unreadable, read_stream
from nudge.components.ingest import sources
from nudge.components.ingest.cleaning import Cleaner, Tally
from nudge.components.ingest.duplicates import Documents
from nudge.components.ingest.overlap import Overlap
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.sources import CHANGES, Changed, Source, fetched, opened
from nudge.components.ingest.stores import Vanished

AT_ONCE = 16
"""Objects that are fetched concurrently."""
AHEAD_BYTES = 32 << 20
"""At most this much fetched data waits for its turn."""


def read_objects(
    chosen: Mapping[int, Source],
    settings: IngestSettings,
    documents: Documents,
    keep_out: Overlap,
    bar: Progress | None = None,
) -> dict[int, dict[str, Any]]:
    """Read and clean objects into ``documents``; returns the facts of each object by its number.

    ``keep_out`` is the text that training documents may not share.
    """
    tallies = []
    with Cleaner(settings, documents, keep_out) as cleaner, ahead(chosen) as objects:
        for number, source, data in objects:
            tallies.append(_read(source, number, data, settings, cleaner))
            if bar:
                bar.advance(1, documents=cleaner.documents_in)
    return {tally.number: tally.facts() for tally in tallies}


@contextmanager
def ahead(chosen: Mapping[int, Source]) -> Iterator[Iterator[tuple[int, Source, bytes | None]]]:
    """Each object in order, with its bytes if they were fetched."""
    with ThreadPoolExecutor(AT_ONCE, "fetch") as pool:
        try:
            yield _fetched_ahead(chosen, pool)
        finally:
            pool.shutdown(cancel_futures=True)


def _fetched_ahead(
    chosen: Mapping[int, Source], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, Source, bytes | None]]:
    waiting: collections.deque[tuple[int, int, Future[bytes | None] | None]] = collections.deque()
    fetched_bytes = 0

    def first() -> tuple[int, Source, bytes | None]:
        nonlocal fetched_bytes
        number, size, future = waiting.popleft()
        fetched_bytes -= size
        return number, chosen[number], future.result() if future else None

    for number, source in chosen.items():
        size = source.bytes if source.listed else None
        if size is None or size > sources.BLOCK_BYTES or not source.is_readable:
            waiting.append((number, 0, None))
        else:
            while waiting and fetched_bytes + size > AHEAD_BYTES:
                yield first()
            waiting.append((number, size, pool.submit(fetched, source)))
            fetched_bytes += size
        if len(waiting) > AT_ONCE:
            yield first()
    while waiting:
        yield first()


def _read(
    source: Source, number: int, data: bytes | None, settings: IngestSettings, cleaner: Cleaner
) -> Tally:
    """Pass one object's records to the cleaner; all belong to one version of the object."""
    if data is not None:
        tally = Tally(number, source.uri)
        for record in read_stream(io.BytesIO(data), source.name, settings.reading):
            cleaner.put(tally, record)
        tally.stored_bytes = len(data)
        return tally
    if not source.is_readable:
        tally = Tally(number, source.uri)
        size = source.bytes or 0
        cleaner.put(tally, Record("", Unreadable(source.unread, bytes=size)))
        tally.stored_bytes = size
        return tally
    lost = ""
    for _ in range(CHANGES):
        tally = Tally(number, source.uri)
        try:
            with opened(source, settings) as (records, file):
                for record in records:
                    cleaner.put(tally, record)
            tally.stored_bytes = file.size
            return tally
        except Changed:
            lost = "changed_while_read"
        except Vanished:
            lost = "vanished"
        cleaner.forget(tally)
    tally = Tally(number, source.uri)
    tally.lost = True
    cleaner.put(tally, Record("", Unreadable(lost)))
    return tally
