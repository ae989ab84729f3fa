"""Exact and near duplicates, in tables on disk, so that memory does not grow with the documents.

Texts are stored one after another in a file beside the tables: a database reads 2048 rows at once,
and that many books do not fit in memory.

Two documents are near duplicates if they share a MinHash key. Documents connected by such pairs
form a cluster, found by large-star and small-star (Kiveris et al., "Connected components in
MapReduce and beyond", 2014). The document with the largest keyed hash of each cluster is kept. That
hash also decides the split: small values are held out. So a document never changes its split, and
if any document of a cluster was ever trained on, the one that is kept is trained on too, as long as
that text is still among the sources. Removed texts are not remembered: if a document is edited in
place, the split of the new form is drawn afresh, and it may be held out although a model was
trained on the old form.

Signatures follow Broder, "On the resemblance and containment of documents" (1997); the parameters
are datatrove's defaults: word 5-grams and 14 buckets of 8 hashes, which find pairs with a Jaccard
similarity of about 0.7 or more. The hash of a gram is computed from the hashes of its words, which
are computed once per distinct word. The 112 hashes of a gram are multiply-shift hashes
(Dietzfelbinger et al., "A reliable randomized algorithm for the closest-pair problem", 1997), whose
high bits count.
"""

import hashlib
import itertools
import os
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nudge.components.common.chat.conversation import from_json
from nudge.components.common.core.scripts import SPACELESS

if TYPE_CHECKING:
    from nudge.components.ingest.cleaning import Row

NGRAM, BUCKETS, ROWS = 5, 14, 8
CHUNK = 128
"""Grams that are hashed at once; the 112 hashes of each stay in a core's cache."""
WORDS_HELD = 1 << 16
"""About 10 MB in each process. With twice as many, 16 MB of text with 112,000 distinct words take
1.2 s instead of 1.7 s; but then ten times the text needs up to 1.3 times the memory."""
LONG = 1 << 20
"""Characters of a text that are processed together."""
MARKS = string.punctuation + "“”„‘’‚«»‹›…–—"
ALONE = re.compile(f"([{SPACELESS}])")
"""Letters of scripts without spaces between words; each is one word."""


# Odd factors; one hash is the factor times the gram, modulo 2**64.
FACTORS = np.random.Generator(np.random.Philox(key=1)).integers(
    0, 1 << 63, BUCKETS * ROWS, dtype=np.uint64
) * np.uint64(2) + np.uint64(1)
STEP, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


class _Words(dict[str, int]):
    """Hashes of words without case, accents and surrounding punctuation; 0 if nothing is left."""

    def __missing__(self, word: str) -> int:
        if len(self) >= WORDS_HELD:
            self.clear()
        plain = word.strip(MARKS).lower()
        if plain.isascii():  # most forms of a word differ only in case and punctuation
            value = self.get(plain)
            if value is None:
                self[plain] = value = _hash(plain) if plain else 0
        else:
            apart = unicodedata.normalize("NFD", plain)
            plain = "".join(c for c in apart if not unicodedata.combining(c))
            value = _hash(plain) if plain else 0
        self[word] = value
        return value


_words = _Words()


def word_hashes(text: str) -> np.ndarray:
    """The hashes of a text's words, without case, accents and punctuation; uint64 [words].

    A text without words has one, of all of it.
    """
    if not text.isascii():
        pieces = (text[start : start + LONG] for start in range(0, len(text), LONG))
        text = "".join(ALONE.sub(r" \1 ", piece) for piece in pieces)
    # As lists, the pieces of 5 million Chinese words took 550 MB; one at a time, 250.
    found = text.split() if len(text) < LONG else map(re.Match.group, re.finditer(r"\S+", text))
    words = np.fromiter(map(_words.__getitem__, found), np.uint64)
    words = words[words != 0]
    return words if len(words) else np.array([_hash(text)], np.uint64)


def gram_hashes(words: np.ndarray, width: int) -> np.ndarray:
    """The hashes of all ``width`` consecutive words; uint64 [words - width + 1]."""
    count = len(words) - width + 1
    grams = np.zeros(count, np.uint64)
    for first in range(width):
        grams = grams * STEP + words[first : first + count]
    return _mixed(grams)


def signature(words: np.ndarray, rows: int = ROWS) -> list[int]:
    """One 64-bit key per bucket from a text's `word_hashes`; two texts that share a key are near
    duplicates. Buckets of fewer ``rows`` find more pairs, which are less similar."""
    grams = gram_hashes(words, min(NGRAM, len(words)))
    smallest = np.full(BUCKETS * ROWS, np.iinfo(np.uint64).max)
    for start in range(0, len(grams), CHUNK):
        hashes = grams[start : start + CHUNK, None] * FACTORS
        np.minimum(smallest, hashes.min(axis=0), out=smallest)
    keys = np.zeros(len(smallest) // rows, np.uint64)
    for row in smallest.reshape(-1, rows).T:
        keys = _mixed((keys ^ row) * STEP)
    return list(keys.tolist())


def grams_of(text: str) -> np.ndarray:
    """The distinct hashes of the word 5-grams of a text, in order; uint64 [grams]."""
    words = word_hashes(text)
    return np.unique(gram_hashes(words, min(NGRAM, len(words))))


def hash_of(words: np.ndarray) -> int:
    """One 64-bit hash of all `word_hashes` of a text."""
    return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest())


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread each bit over all (the finalizer of SplitMix64, Steele et al. 2014, shortened)."""
    values = (values ^ (values >> np.uint64(30))) * MIX
    return values ^ (values >> np.uint64(27))


KEYS = [f"k{bucket}" for bucket in range(BUCKETS)]
ROW = {
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
    "turns": "UBIGINT[]",
}
"""A document as `Documents.save` writes it; the tables have ``text_at`` and ``characters`` instead
of the text. ``turns`` is NULL unless the text is the JSON of a conversation (`twins`)."""
TYPES: dict[str, Any] = {
    "BIGINT": "int64",
    "INTEGER": "int32",
    "VARCHAR": "string",
    "DOUBLE": "float64",
    "UBIGINT": "uint64",
}
REST = [name for name in ROW if name != "text"]
PLACES = 32
"""The low bits of ``doc`` are the index in the object; the bits above are the object's number."""
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
        # Otherwise it appears in the output of a step.
        self._database.execute("SET enable_progress_bar = false")
        rest = ", ".join(f"{name} {ROW[name]}" for name in REST)
        self._database.execute(f"CREATE TABLE docs ({rest}, text_at BIGINT, characters BIGINT)")
        # The sides of first user turns in earlier runs; see `twins`.
        self._database.execute("CREATE TABLE remembered (first UBIGINT, side DOUBLE)")
        self._texts = (folder / "texts").open("w+b")
        self._rows: list[tuple[Any, ...]] = []
        self._unwritten_bytes = 0
        self._written = -1

    def add(self, number: int, place: int, row: "Row") -> None:
        """Add document number ``place`` of object ``number``; objects arrive in order."""
        *values, keys, turns = row
        self._rows.append((_doc(number, place), number, *values, *keys, turns))
        self._unwritten_bytes += row.bytes
        if self._unwritten_bytes >= BATCH_BYTES or len(self._rows) >= BATCH_ROWS:
            self.flush()

    def remove(self, number: int) -> None:
        """Remove every document of an object."""
        self._rows = [row for row in self._rows if row[1] != number]
        if number <= self._written:
            self._database.execute("DELETE FROM docs WHERE object = ?", [number])

    def save(self, path: Path, numbers: Sequence[int]) -> None:
        """Write the documents of some objects into a Parquet file with a few MB per row group."""
        import pyarrow
        import pyarrow.parquet

        self.flush()
        schema = pyarrow.schema([(name, _arrow_type(kind)) for name, kind in ROW.items()])
        rows = self.query(
            f"SELECT text_at, bytes, {', '.join(REST)} FROM docs "
            "SEMI JOIN (SELECT unnest(?::INTEGER[]) AS object) USING (object)",
            [list(numbers)],
        )
        with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as file:
            for batch in _batches(rows):
                columns = dict(zip(REST, list(zip(*batch, strict=True))[2:], strict=True))
                texts = [self.text(at, size) for at, size, *_ in batch]
                file.write_table(pyarrow.table({**columns, "text": texts}, schema))

    def load(self, path: Path, numbers: Mapping[int, int]) -> None:
        """Add what `save` wrote for some objects; ``numbers`` maps old numbers to new."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                is_wanted = [number in numbers for number in table["object"].to_pylist()]
                table = table.filter(is_wanted)
                here = [numbers[number] for number in table["object"].to_pylist()]
                places = [doc & ((1 << PLACES) - 1) for doc in table["doc"].to_pylist()]
                docs = list(map(_doc, here, places))
                columns = {name: table[name] for name in REST}
                # pyarrow cannot convert an array of lists with nulls to itself.
                turns = table["turns"].to_pylist()
                columns |= {"doc": docs, "object": here, "turns": turns}
                self._insert(columns, table["text"].to_pylist())

    def remember(self, sides: Sequence[tuple[int, float]]) -> None:
        """Add sides that an earlier run remembered, by the hash of a first user turn."""
        firsts, values = [first for first, _ in sides], [side for _, side in sides]
        self.run(
            "INSERT INTO remembered SELECT unnest(?::UBIGINT[]), unnest(?::DOUBLE[])",
            [firsts, values],
        )

    def close(self) -> None:
        self._database.close()
        self._texts.close()

    def text(self, at: int, size: int) -> str:
        """The text of a document, located by its columns ``text_at`` and ``bytes``."""
        return os.pread(self._texts.fileno(), size, at).decode()

    def plain_text(self, is_conversation: bool, at: int, size: int) -> str:
        """The text of a document, or of all turns of a conversation."""
        text = self.text(at, size)
        return from_json(text).transcript() if is_conversation else text

    @property
    def conversations(self) -> int:
        """How many documents are conversations, duplicates included."""
        return int(next(self.query("SELECT count(*) FROM docs WHERE turns IS NOT NULL"))[0])

    def run(self, sql: str, values: Sequence[Any] = ()) -> None:
        """Run a statement that returns no rows."""
        self._database.execute(sql, list(values))

    def query(self, sql: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, fetched in batches."""
        cursor = self._database.cursor().execute(sql, list(values))
        while rows := cursor.fetchmany(256):
            yield from rows

    def find_duplicates(self, near: bool) -> None:
        """Create the table ``verdicts``: each doc with its reason, NULL if it is kept, and its
        ``side``, the number in [0, 1) that decides its split."""
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
        self.join_clusters()
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
                    WHEN kept.best <> docs.doc THEN 'near_duplicate' END AS reason,
                docs.share AS side
            FROM docs LEFT JOIN firsts ON docs.doc = firsts.doc
                LEFT JOIN members ON docs.doc = members.doc
                LEFT JOIN kept ON members.cluster = kept.cluster"""
        )

    def join_clusters(self) -> None:
        """Turn ``edges`` into stars: each member v with the smallest member u of its cluster."""
        before = None
        while before != (now := self._stars()):
            before = now
            # Large star: link each larger neighbor to the smallest of all neighbors and itself.
            self._replace(
                """SELECT DISTINCT m.lowest, e.v FROM pairs e JOIN m USING (u)
                WHERE e.v > e.u AND m.lowest <> e.v"""
            )
            # Small star: link each smaller neighbor and itself to the smallest of those.
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
        """Write the rows that are still in memory."""
        if not self._rows:
            return
        columns = dict(zip(ROW, zip(*self._rows, strict=True), strict=True))
        self._insert(columns, columns.pop("text"))
        self._written = max(self._written, self._rows[-1][1])
        self._rows, self._unwritten_bytes = [], 0

    def _insert(self, columns: Mapping[str, Any], texts: Sequence[str]) -> None:
        import pyarrow

        raw = [text.encode() for text in texts]
        ends = itertools.accumulate(map(len, raw), initial=self._texts.tell())
        self._texts.writelines(raw)
        self._texts.flush()
        rows = {
            **{name: pyarrow.array(columns[name], _arrow_type(ROW[name])) for name in REST},
            "text_at": list(ends)[:-1],
            "characters": list(map(len, texts)),
        }
        self._database.register("batch", pyarrow.table(rows))
        self._database.execute("INSERT INTO docs BY NAME SELECT * FROM batch")
        self._database.unregister("batch")


def _arrow_type(kind: str) -> Any:
    import pyarrow

    return pyarrow.list_(pyarrow.uint64()) if kind.endswith("[]") else TYPES[kind]


def _doc(number: int, place: int) -> int:
    return (number << PLACES) | place


def _batches(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Batches of some MB of text; a row begins with its text's offset and size in bytes."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += row[1]
        if size >= BATCH_BYTES or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
