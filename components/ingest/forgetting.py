"""Documents to forget: they, their copies and near duplicates get the verdict ``forgotten``."""

from collections.abc import Sequence

from nudge.components.common.core.say import say
from nudge.components.ingest.duplicates import Documents


def forget(documents: Documents, entries: Sequence[str], uris: Sequence[str]) -> None:
    """Give the verdict to every document that an entry of `IngestSettings.forget` names.

    ``uris`` are the objects' by number. It follows `Documents.find_duplicates`, which would
    otherwise keep a copy or a near duplicate instead. Entries that fit no document are named on
    stderr, as a name that was mistyped would be.
    """
    kinds: dict[str, list[str]] = {"sha256": [], "id": []}
    objects: list[int] = []
    unknown = []
    for entry in entries:
        kind, colon, value = entry.partition(":")
        if colon and kind in kinds and value:
            kinds[kind].append(value)
            column = "starts_with(sha256, ?)" if kind == "sha256" else "id = ?"
            fits = next(documents.query(f"SELECT count(*) FROM docs WHERE {column}", [value]))[0]
        else:
            end = "/" + entry.rpartition("://")[2].removeprefix("./").lstrip("/")
            named = [number for number, uri in enumerate(uris) if f"/{uri}".endswith(end)]
            objects += named
            fits = len(named)
        if not fits:
            unknown.append(entry)
    _mark(documents, kinds["sha256"], kinds["id"], objects)
    if unknown:
        say(f"ingest.forget: no document fits {', '.join(unknown)}")


def _mark(
    documents: Documents, sha256: Sequence[str], ids: Sequence[str], objects: Sequence[int]
) -> None:
    documents.run(
        """CREATE TABLE forgotten AS SELECT DISTINCT docs.sha256 FROM docs
        WHERE object IN (SELECT unnest(?::INTEGER[])) OR id IN (SELECT unnest(?::VARCHAR[]))
            OR EXISTS (SELECT 1 FROM (SELECT unnest(?::VARCHAR[]) AS begun)
                WHERE starts_with(docs.sha256, begun))""",
        [list(objects), list(ids), list(sha256)],
    )
    documents.run(
        """CREATE TABLE gone AS
        WITH members AS (
            SELECT u AS cluster, v AS doc FROM edges UNION SELECT u, u FROM edges
        ), seeds AS (SELECT doc FROM docs SEMI JOIN forgotten USING (sha256)),
        near AS (
            SELECT doc FROM members SEMI JOIN (
                SELECT cluster FROM members SEMI JOIN seeds USING (doc)
            ) AS hit USING (cluster)
        )
        SELECT DISTINCT doc FROM docs SEMI JOIN (
            SELECT sha256 FROM docs SEMI JOIN (
                SELECT doc FROM seeds UNION SELECT doc FROM near
            ) AS each USING (doc)
        ) AS texts USING (sha256)"""
    )
    documents.run("UPDATE verdicts SET reason = 'forgotten' WHERE doc IN (SELECT doc FROM gone)")
