"""Exact and near duplicates, in tables on disk, so that memory does not grow with the documents.

Two documents are near duplicates if they share a MinHash key, and so is what hangs together by
such pairs: a cluster, found by large-star and small-star (Kiveris et al., "Connected components in
MapReduce and beyond", 2014). Of a cluster, the document with the largest keyed hash is kept. That
hash also decides the split, small values being held out: so a document never moves, and if any of
a cluster was ever trained on, what is kept of it is trained on too, whatever comes later.

Signatures as in Broder, "On the resemblance and containment of documents" (1997); the parameters
are datatrove's defaults: word 5-grams, 14 buckets of 8 hashes, which finds pairs of a Jaccard
similarity of about 0.7 and more. A gram is hashed from the hashes of its words, and those once for
each distinct word; the 112 hashes of a gram are multiply-shift ones (Dietzfelbinger et al., "A
reliable randomized algorithm for the closest-pair problem", 1997), whose high bits count.
"""

import contextlib
import hashlib
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nudge.components.ingest.cleaning import Row

NGRAM, BUCKETS, ROWS = 5, 14, 8
CHUNK = 128
"""Grams that are hashed at once; 112 hashes of each stay in a core's cache."""
WORDS_HELD = 1 << 16
MARKS = string.punctuation + "“”„‘’‚«»‹›…–—"
ALONE = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")
"""Letters of scripts that put no spaces between words (Thai, Khmer, Chinese, ...): each a word."""


# Odd ones; a hash is such a factor times the gram, modulo 2**64.
FACTORS = np.random.Generator(np.random.Philox(key=1)).integers(
    0, 1 << 63, BUCKETS * ROWS, dtype=np.uint64
) * np.uint64(2) + np.uint64(1)
STEP, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


class _Words(dict[str, int]):
    """Hashes of words, without case, accents and the punctuation around them; 0 if none is left."""

    def __missing__(self, word: str) -> int:
        plain = word.strip(MARKS).lower()
        if not plain.isascii():
            apart = unicodedata.normalize("NFD", plain)
            plain = "".join(c for c in apart if not unicodedata.combining(c))
        if len(self) >= WORDS_HELD:
            self.clear()
        self[word] = value = _hash(plain) if plain else 0
        return value


_words = _Words()


def signature(text: str) -> list[int]:
    """One key of 64 bits a bucket; two texts that share one are near duplicates."""
    if not text.isascii():
        text = ALONE.sub(r" \1 ", text)
    words = np.fromiter(map(_words.__getitem__, text.split()), np.uint64)
    words = words[words != 0]
    if not len(words):
        words = np.array([_hash(text)], np.uint64)
    width = min(NGRAM, len(words))
    count = len(words) - width + 1
    grams = np.zeros(count, np.uint64)
    for first in range(width):
        grams = grams * STEP + words[first : first + count]
    grams = _mixed(grams)
    smallest = np.full(BUCKETS * ROWS, np.iinfo(np.uint64).max)
    for start in range(0, count, CHUNK):
        hashes = grams[start : start + CHUNK, None] * FACTORS
        np.minimum(smallest, hashes.min(axis=0), out=smallest)
    keys = np.zeros(BUCKETS, np.uint64)
    for row in smallest.reshape(BUCKETS, ROWS).T:
        keys = _mixed((keys ^ row) * STEP)
    return list(keys.tolist())


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread each bit over all (the finaliser of SplitMix64, Steele et al. 2014, shortened)."""
    values = (values ^ (values >> np.uint64(30))) * MIX
    return values ^ (values >> np.uint64(27))


KEYS = [f"k{bucket}" for bucket in range(BUCKETS)]
COLUMNS = {
    "doc": "BIGINT",
    "object": "INTEGER",
    "id": "VARCHAR",
    "text": "VARCHAR",
    "license": "VARCHAR",
    "origin": "VARCHAR",
    "sha256": "VARCHAR",
    "share": "DOUBLE",
    "raw_bytes": "BIGINT",
    "bytes": "BIGINT",
    **dict.fromkeys(KEYS, "UBIGINT"),
}
PLACES = 32
"""Bits of ``doc`` that hold the place in the object; those above are the object's number."""
MEMORY = "192MB"
BATCH_BYTES, BATCH_ROWS = 4 << 20, 10_000


class Documents:
    """The clean documents of a run, in a DuckDB file of ``folder``."""

    def __init__(self, folder: Path) -> None:
        import duckdb

        self.folder = folder
        settings: dict[str, Any] = {
            "memory_limit": MEMORY,
            "threads": 2,
            "temp_directory": str(folder / "spill"),
        }
        self._database = duckdb.connect(str(folder / "documents.duckdb"), config=settings)
        self._database.execute("SET preserve_insertion_order = false")
        # It would stand in what a step prints.
        self._database.execute("SET enable_progress_bar = false")
        columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        self._database.execute(f"CREATE TABLE docs ({columns})")
        self._rows: list[tuple[Any, ...]] = []
        self._held = 0
        self._written = -1

    def add(self, number: int, place: int, row: "Row") -> None:
        """Add the document that stands at ``place`` of object ``number``; objects come in order."""
        *values, keys = row
        self._rows.append(((number << PLACES) | place, number, *values, *keys))
        self._held += row.bytes
        if self._held >= BATCH_BYTES or len(self._rows) >= BATCH_ROWS:
            self.flush()

    def remove(self, number: int) -> None:
        """Forget every document of an object."""
        self._rows = [row for row in self._rows if row[1] != number]
        if number <= self._written:
            self._database.execute("DELETE FROM docs WHERE object = ?", [number])

    def save(self, path: Path, numbers: Sequence[int]) -> None:
        """Write the documents of some objects into a Parquet file."""
        self.flush()
        with self._named(wanted={"object": numbers}):
            self._database.execute(
                "COPY (SELECT docs.* FROM docs SEMI JOIN wanted USING (object)) TO "
                f"'{_quoted(path)}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 4096)"
            )

    def load(self, path: Path, numbers: Mapping[int, int]) -> None:
        """Add what `save` wrote of some objects; ``numbers`` are theirs there and here."""
        rest = ", ".join(f"saved.{name}" for name in list(COLUMNS)[2:])
        with self._named(moved={"there": list(numbers), "here": list(numbers.values())}):
            self._database.execute(
                f"INSERT INTO docs SELECT (here::BIGINT << {PLACES}) | "
                f"(saved.doc & {(1 << PLACES) - 1}), here, {rest} "
                f"FROM read_parquet('{_quoted(path)}') AS saved "
                "JOIN moved ON saved.object = moved.there"
            )

    def close(self) -> None:
        self._database.close()

    def query(self, sql: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, some at a time."""
        cursor = self._database.cursor().execute(sql, list(values))
        while rows := cursor.fetchmany(256):
            yield from rows

    def find_duplicates(self, near: bool) -> None:
        """Make the table ``verdicts``: each doc with its reason, NULL for those that are kept."""
        self.flush()
        run = self._database.execute
        run("CREATE TABLE firsts AS SELECT sha256, min(doc) AS doc FROM docs GROUP BY sha256")
        run("CREATE TABLE edges (u BIGINT, v BIGINT)")
        for key in KEYS if near else ():
            run(
                f"""INSERT INTO edges
                WITH keys AS (SELECT {key} AS k, doc FROM docs SEMI JOIN firsts USING (doc)),
                    shared AS (SELECT k, min(doc) AS u FROM keys GROUP BY k HAVING count(*) > 1)
                SELECT u, doc FROM keys JOIN shared USING (k) WHERE doc <> u"""
            )
        self._join_clusters()
        run(
            """CREATE TABLE verdicts AS
            WITH members AS (
                SELECT u AS cluster, v AS doc FROM edges UNION SELECT u, u FROM edges
            ), kept AS (
                SELECT cluster, arg_max(doc, (share, sha256)) AS best
                FROM members JOIN docs USING (doc) GROUP BY cluster
            )
            SELECT docs.doc AS doc,
                CASE WHEN firsts.doc IS NULL THEN 'duplicate'
                    WHEN kept.best <> docs.doc THEN 'near_duplicate' END AS reason
            FROM docs LEFT JOIN firsts ON docs.doc = firsts.doc
                LEFT JOIN members ON docs.doc = members.doc
                LEFT JOIN kept ON members.cluster = kept.cluster"""
        )

    def _join_clusters(self) -> None:
        """Turn ``edges`` into stars: each member v beside the smallest, u, of its cluster."""
        before = None
        while before != (now := self._stars()):
            before = now
            # Large star: to each larger neighbour, the smallest of all neighbours and itself.
            self._replace(
                """SELECT DISTINCT m.lowest, e.v FROM pairs e JOIN m USING (u)
                WHERE e.v > e.u AND m.lowest <> e.v"""
            )
            # Small star: to each neighbour not larger and itself, the smallest of those.
            self._replace(
                """WITH small AS (SELECT u, v FROM pairs WHERE v < u),
                    low AS (SELECT u, min(v) AS lowest FROM small GROUP BY u),
                    around AS (SELECT u, v FROM small UNION SELECT u, u FROM small)
                SELECT DISTINCT low.lowest, around.v FROM around JOIN low USING (u)
                WHERE low.lowest <> around.v"""
            )

    def _stars(self) -> tuple[Any, ...]:
        sql = "SELECT count(*), sum(hash(u, v)::HUGEINT) FROM edges"
        row = self._database.execute(sql).fetchone()
        return tuple(row or ())

    def _replace(self, select: str) -> None:
        pairs = "pairs AS (SELECT u, v FROM edges UNION SELECT v, u FROM edges)"
        least = "m AS (SELECT u, least(min(v), u) AS lowest FROM pairs GROUP BY u)"
        self._database.execute(
            f"CREATE TABLE next AS WITH {pairs}, {least} SELECT * FROM ({select}) AS made(u, v)"
        )
        self._database.execute("DROP TABLE edges")
        self._database.execute("ALTER TABLE next RENAME TO edges")

    def flush(self) -> None:
        """Write what waits in memory."""
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        with self._named(batch=dict(zip(COLUMNS, columns, strict=True))):
            self._database.execute("INSERT INTO docs SELECT * FROM batch")
        self._written = max(self._written, self._rows[-1][1])
        self._rows, self._held = [], 0

    @contextlib.contextmanager
    def _named(self, **tables: Mapping[str, Sequence[Any]]) -> Iterator[None]:
        """Let the database see columns of values as tables."""
        import pyarrow

        types = {"BIGINT": "int64", "INTEGER": "int32", "DOUBLE": "float64", "UBIGINT": "uint64"}
        for name, columns in tables.items():
            arrays = [
                pyarrow.array(values, types.get(COLUMNS.get(column, "INTEGER"), "string"))
                for column, values in columns.items()
            ]
            self._database.register(name, pyarrow.table(arrays, names=list(columns)))
        try:
            yield
        finally:
            for name in tables:
                self._database.unregister(name)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
