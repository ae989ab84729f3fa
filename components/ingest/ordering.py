"""Rows in the order of their hash, by way of the disk where they are more than memory should hold.

A database's sort carries the texts along and wants memory for them; hashes are spread evenly, so
that a file for each of their first digits holds few enough rows to be sorted by themselves.
"""

import pickle
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PART_BYTES = 16 << 20
"""So much is sorted in memory at once."""


def in_hash_order(
    rows: Iterator[tuple[Any, ...]], size: int, folder: Path, start: int = 0
) -> Iterator[tuple[Any, ...]]:
    """The rows by their first value, a hex digest, of which ``start`` digits are equal in all.

    ``size`` says roughly how many bytes they are; ``folder`` takes what memory should not hold.
    """
    if size <= PART_BYTES:
        yield from sorted(rows)
        return
    digits = 1 if size <= 16 * PART_BYTES else 2
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    files: dict[str, IO[bytes]] = {}
    with tempfile.TemporaryDirectory(prefix="order-", dir=folder) as name:
        place = Path(name)
        for row in rows:
            part = row[0][start : start + digits]
            if part not in files:
                files[part] = (place / part).open("wb", buffering=1 << 15)
            pickle.dump(row, files[part], pickle.HIGHEST_PROTOCOL)
            sizes[part] += sum(map(sys.getsizeof, row))
            counts[part] += 1
        for file in files.values():
            file.close()
        for part in sorted(files):
            stored, size = _stored(place / part), sizes[part] if counts[part] > 1 else 0
            yield from in_hash_order(stored, size, folder, start + digits)
            (place / part).unlink()


def _stored(path: Path) -> Iterator[tuple[Any, ...]]:
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return
