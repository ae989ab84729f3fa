"""Sorts rows by their hash, on disk if there are too many for memory.

A database's sort carries the texts along and needs memory for them. Hashes are spread evenly, so
one file per leading digit has few enough rows to sort in memory.
"""

import pickle
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PART_BYTES = 16 << 20
"""At most this much is sorted in memory at once."""


def in_hash_order(
    rows: Iterator[tuple[Any, ...]], size: int, folder: Path, start: int = 0
) -> Iterator[tuple[Any, ...]]:
    """The rows in the order of their first value, a hex digest.

    The first ``start`` digits are equal in all rows. ``size`` is roughly the rows' size in bytes;
    temporary files are written into ``folder``.
    """
    if size <= PART_BYTES:
        yield from sorted(rows)
        return
    digits = 1 if size <= 16 * PART_BYTES else 2
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    files: dict[str, IO[bytes]] = {}
    with tempfile.TemporaryDirectory(prefix="order-", dir=folder) as name:
        parts = Path(name)
        for row in rows:
            part = row[0][start : start + digits]
            if part not in files:
                files[part] = (parts / part).open("wb", buffering=1 << 15)
            pickle.dump(row, files[part], pickle.HIGHEST_PROTOCOL)
            sizes[part] += sum(map(sys.getsizeof, row))
            counts[part] += 1
        for file in files.values():
            file.close()
        for part in sorted(files):
            stored, size = _stored(parts / part), sizes[part] if counts[part] > 1 else 0
            yield from in_hash_order(stored, size, folder, start + digits)
            (parts / part).unlink()


def _stored(path: Path) -> Iterator[tuple[Any, ...]]:
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return
