"""Finds conversations that ask the same: they share a split, and one of them is kept.

Twins are conversations whose first user turns are equal but for case, accents and punctuation, or
have a Jaccard similarity of at least `SIMILAR` in word 5-grams (candidates come from MinHash, as
for texts, and each pair is checked). Conversations connected by twins, or by being near duplicates
as a whole, form a cluster, and all of it has one split: that of the largest keyed hash of a first
user turn in it. So twins never land on both sides, and as a corpus grows, a cluster can only change
from held out to trained on.

A conversation that so came to be trained on must not be held out after the rest of its cluster has
vanished from the sources. The state of `ingest` therefore remembers its side by the hash of its
first user turn (`sides_to_remember`); `judge` finds these in the table ``remembered``.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nudge.components.common.chat.conversation import from_json
from nudge.components.ingest.duplicates import Documents, grams_of

SIMILAR = 0.7
FEW = 32
"""If more conversations share a key, each is compared with only one of them instead of all."""
READ_AHEAD = 4096
"""Conversations whose 5-grams stay in memory while pairs are compared."""

ASKED = """CREATE TABLE asked AS
    SELECT doc, share, sha256, text_at, bytes, turns[1] AS user_side, turns[2] AS first,
        turns[3:] AS keys
    FROM docs WHERE turns IS NOT NULL"""
CANDIDATES = f"""
    WITH one AS (
        SELECT arg_max(doc, (share, sha256)) AS doc FROM asked GROUP BY first
    ), keyed AS (
        SELECT doc, share, unnest(keys) AS k FROM asked SEMI JOIN one USING (doc)
    ), groups AS (
        SELECT k, count(*) AS n, arg_max(doc, share) AS center
        FROM keyed GROUP BY k HAVING count(*) > 1
    ), pairs AS (
        SELECT a.doc AS u, b.doc AS v
        FROM keyed a JOIN groups USING (k) JOIN keyed b USING (k)
        WHERE n <= {FEW} AND a.doc < b.doc
        UNION
        SELECT least(center, doc), greatest(center, doc)
        FROM keyed JOIN groups USING (k) WHERE n > {FEW} AND doc <> center
    )
    SELECT u, a.text_at, a.bytes, v, b.text_at, b.bytes
    FROM pairs JOIN asked a ON a.doc = u JOIN asked b ON b.doc = v ORDER BY u, v"""
EQUAL = """SELECT min(doc) OVER (PARTITION BY {column}) AS u, doc AS v FROM asked QUALIFY u <> v"""


def judge(documents: Documents, prompts: str) -> None:
    """Change the verdicts of `Documents.find_duplicates`: twins get one ``side``, and conversations
    with the same user side the reason ``repeated_prompt`` or ``near_repeated_prompt``.

    ``prompts`` is the setting ``repeated_prompts``.
    """
    if not documents.conversations:
        return
    run = documents.run
    run("ALTER TABLE verdicts RENAME TO found")
    run(ASKED)
    run("CREATE TABLE whole AS SELECT u, v FROM edges")
    run("CREATE TABLE twins (u BIGINT, v BIGINT, is_side BOOLEAN)")
    pairs = _verified(documents)
    while some := list(itertools.islice(pairs, READ_AHEAD)):
        run(
            "INSERT INTO twins SELECT unnest(?::BIGINT[]), unnest(?::BIGINT[]), "
            "unnest(?::BOOLEAN[])",
            [list(column) for column in zip(*some, strict=True)],
        )
    _repeated(documents, prompts)
    _clustered(
        documents,
        f"""{EQUAL.format(column="first")}
        UNION SELECT u, v FROM twins UNION SELECT u, v FROM whole SEMI JOIN asked ON v = doc""",
    )
    run(
        """CREATE TABLE sides AS
        SELECT doc, max(greatest(share, side)) OVER (PARTITION BY cluster) AS joint
        FROM (
            SELECT doc, coalesce(u, doc) AS cluster, share, coalesce(side, 0) AS side
            FROM asked LEFT JOIN edges ON doc = v LEFT JOIN remembered USING (first)
        )
        """
    )
    run(
        """CREATE TABLE verdicts AS
        SELECT found.doc AS doc, coalesce(repeated.reason, found.reason) AS reason,
            coalesce(joint, side) AS side
        FROM found LEFT JOIN sides USING (doc) LEFT JOIN repeated USING (doc)
        """
    )


def sides_to_remember(documents: Documents) -> list[tuple[int, float]]:
    """The side of each first user turn, by its hash, that a cluster has changed now or earlier;
    none of a forgotten conversation. `judge` was called."""
    if not documents.conversations:
        return list(documents.query("SELECT first, side FROM remembered ORDER BY first"))
    return list(
        documents.query(
            """SELECT first, max(side) FROM (
                SELECT first, joint AS side FROM asked JOIN sides USING (doc) WHERE joint > share
                UNION ALL SELECT first, side FROM remembered
            ) WHERE first NOT IN (
                SELECT first FROM asked JOIN verdicts USING (doc) WHERE reason = 'forgotten'
            ) GROUP BY first ORDER BY first"""
        )
    )


def _repeated(documents: Documents, prompts: str) -> None:
    """Create the table ``repeated`` (doc, reason) of conversations whose user side another has."""
    near = "UNION SELECT u, v FROM twins WHERE is_side" if prompts == "drop" else ""
    _clustered(documents, f"{EQUAL.format(column='user_side')} {near}")
    documents.run(
        f"""CREATE TABLE repeated AS
        WITH members AS (
            SELECT coalesce(u, doc) AS cluster, doc, share, sha256, user_side
            FROM asked JOIN found USING (doc) LEFT JOIN edges ON doc = v
            WHERE reason IS NULL AND {"true" if prompts != "keep" else "false"}
        ), kept AS (
            SELECT cluster, arg_max(doc, (share, sha256)) AS best,
                arg_max(user_side, (share, sha256)) AS best_side
            FROM members GROUP BY cluster
        )
        SELECT doc, CASE WHEN user_side = best_side THEN 'repeated_prompt'
            ELSE 'near_repeated_prompt' END AS reason
        FROM members JOIN kept USING (cluster) WHERE doc <> best"""
    )


def _clustered(documents: Documents, select: str) -> None:
    """Make ``edges`` the stars of the clusters that some pairs form."""
    documents.run("DROP TABLE edges")
    documents.run(f"CREATE TABLE edges AS SELECT * FROM ({select}) AS made(u, v)")
    documents.join_clusters()


def _verified(documents: Documents) -> Iterator[tuple[int, int, bool]]:
    """The pairs of twins, and whether all of their user sides are similar too."""
    grams = functools.lru_cache(READ_AHEAD)(_reader(documents))
    for u, *first, v, at, size in documents.query(CANDIDATES):
        one, other = grams(*first), grams(at, size)
        if _similarity(one[0], other[0]) >= SIMILAR:
            yield u, v, _similarity(one[1], other[1]) >= SIMILAR


def _reader(documents: Documents) -> Callable[[int, int], tuple[Any, Any]]:
    def read(at: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        found = from_json(documents.text(at, size))
        return grams_of(found.first_user_turn()), grams_of(found.user_side())

    return read


def _similarity(one: np.ndarray, other: np.ndarray) -> float:
    """The Jaccard similarity of two sorted arrays of distinct hashes."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
