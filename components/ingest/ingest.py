"""The step `ingest`: sources in, a clean, deduplicated and split corpus out."""

import hashlib
import hmac
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nudge.components.common.errors import UserError
from nudge.components.common.publish import published, write_atomic
from nudge.components.common.step import step
from nudge.components.ingest.settings import IngestSettings

if TYPE_CHECKING:
    from nudge.components.common.corpus import Document
    from nudge.components.ingest.duplicates import Documents
    from nudge.components.ingest.filters import Filter
    from nudge.components.ingest.sources import Source

SAMPLES = 5
KEPT = "FROM docs JOIN verdicts USING (doc) WHERE reason IS NULL"


@step("ingest", outputs=("corpus", "report"), reuse=False)
def ingest(settings: IngestSettings, *, corpus: Path, report: Path) -> dict[str, Any]:
    """Read every source, drop what cannot be used, split the rest.

    ``corpus`` becomes a corpus artifact (`nudge.components.common.corpus`), ``report`` a page.
    ``documents_in`` is ``documents`` plus every count in ``dropped``, in all and for each source.
    Documents wait in tables beside ``corpus``, so that memory does not grow with their number.
    Raises `UserError` if a source is missing or nothing that could be split is left.
    """
    from nudge.components.common.corpus import SPLITS, write_corpus
    from nudge.components.common.progress import progress
    from nudge.components.ingest.duplicates import Documents
    from nudge.components.ingest.filters import make_filters
    from nudge.components.ingest.novelty import is_new
    from nudge.components.ingest.report import render_report
    from nudge.components.ingest.sources import find_sources

    filters = make_filters(settings)
    sources = find_sources(settings.data_uri)
    corpus.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ingest-", dir=corpus.parent) as folder:
        documents = Documents(Path(folder))
        facts = []
        samples: dict[str, list[str]] = {}
        with progress("ingest", total=len(sources), unit="files") as bar:
            for number, source in enumerate(sources):
                facts.append(_read(source, number, settings, filters, documents, samples))
                bar.advance(1, documents=sum(fact["documents_in"] for fact in facts))
            bar.note(stage="looking for duplicates")
            documents.find_duplicates(settings.near_duplicates)
            _count_duplicates(documents, sources, facts, samples)
            counts = _counts(settings, documents, facts)
            columns = [fact.pop("columns") for fact in facts]
            _check(settings, counts, next(filter(None, columns), ""))
            bar.note(stage="writing")
            with published(corpus) as part:
                kept = {split: _kept(documents, split, sources, settings) for split in SPLITS}
                fingerprint = write_corpus(part, kept, counts)
        lengths = documents.query(
            f"SELECT 1::BIGINT << floor(log2(length(text)))::INT AS low, count(*) {KEPT} "
            "GROUP BY low ORDER BY low"
        )
        held_out = documents.query(
            f"SELECT left(text, 600) {KEPT} AND share < ? ORDER BY sha256 LIMIT 3",
            [settings.validation_share],
        )
        page = render_report(
            counts, fingerprint, dict(lengths), samples, [text for (text,) in held_out]
        )
        documents.close()
    write_atomic(report, page)
    return {
        "documents": counts["documents"],
        "train_documents": counts["train_documents"],
        "validation_documents": counts["validation_documents"],
        "bytes": counts["bytes"],
        "fingerprint": fingerprint,
        "new": int(is_new(settings, fingerprint)),
    }


def split_of(text: str, settings: IngestSettings) -> str:
    """The split of a document: a keyed hash of its text, so it stays there as the corpus grows."""
    return "validation" if share_of(text, settings) < settings.validation_share else "train"


def share_of(text: str, settings: IngestSettings) -> float:
    """The keyed hash of a text, in [0, 1)."""
    digest = hmac.digest(str(settings.seed).encode(), text.encode(), "sha256")
    return int.from_bytes(digest[:8]) / 2**64


def _read(
    source: "Source",
    number: int,
    settings: IngestSettings,
    filters: "list[Filter]",
    documents: "Documents",
    samples: dict[str, list[str]],
) -> dict[str, Any]:
    """Add one object's documents and return its facts; all are of one version of the object."""
    from nudge.components.ingest.formats import Unreadable
    from nudge.components.ingest.sources import CHANGES, Changed, Vanished, opened

    lost = ""
    for _ in range(CHANGES):
        told: dict[str, list[str]] = {}
        try:
            with documents.transaction(), opened(source, settings) as (records, file):
                fact = _clean(records, number, settings, filters, documents, told)
            fact |= {"uri": source.uri, "bytes": file.size}
            break
        except Changed:
            lost = "changed_while_read"
        except Vanished:
            lost = "vanished"
    else:
        told = {}
        gone = [("", Unreadable(lost))]
        fact = _clean(iter(gone), number, settings, filters, documents, told)
        fact |= {"uri": source.uri, "bytes": 0}
    for reason, examples in told.items():
        shown = samples.setdefault(reason, [])
        shown += [f"{source.uri} {example}" for example in examples[: SAMPLES - len(shown)]]
    return fact


def _clean(
    records: Any,
    number: int,
    settings: IngestSettings,
    filters: "list[Filter]",
    documents: "Documents",
    samples: dict[str, list[str]],
) -> dict[str, Any]:
    from nudge.components.common.corpus import text_sha256
    from nudge.components.ingest.duplicates import BUCKETS, signature
    from nudge.components.ingest.filters import normalise
    from nudge.components.ingest.formats import Unreadable

    digest, documents_in, bytes_in, columns = hashlib.sha256(), 0, 0, ""
    dropped: Counter[str] = Counter()
    for name, raw in records:
        documents_in += 1
        text: str | Unreadable = raw
        raw_bytes = 0
        if isinstance(raw, str):
            raw_bytes = len(raw.encode("utf-8", "replace"))
            text = normalise(raw)
        bytes_in += raw_bytes
        for apply in filters:
            if not isinstance(text, str):
                break
            text = apply(text)
        if isinstance(text, str) and not text:
            text = Unreadable("too_short")
        if not isinstance(text, str):
            dropped[text.reason] += 1
            shown = samples.setdefault(text.reason, [])
            if text.reason == "no_column":
                columns = columns or text.detail
            if len(shown) < SAMPLES:
                said = raw[:120] if isinstance(raw, str) else text.detail
                shown.append(f"{normalise(name)}: {normalise(said)}")
            continue
        sha256, size = text_sha256(text), len(text.encode())
        digest.update(sha256.encode())
        keys = signature(text) if settings.near_duplicates else [0] * BUCKETS
        share = share_of(text, settings)
        row = (number, normalise(name), text, sha256, share, raw_bytes, size, *keys)
        documents.add(row, size)
    return {
        "documents_in": documents_in,
        "text_bytes_in": bytes_in,
        "dropped": dict(dropped),
        "sha256": digest.hexdigest(),
        "columns": columns,
    }


def _count_duplicates(
    documents: "Documents",
    sources: "list[Source]",
    facts: list[dict[str, Any]],
    samples: dict[str, list[str]],
) -> None:
    """Complete each source's facts with what `find_duplicates` told of its documents."""
    for fact in facts:
        fact |= {"documents": 0, "kept_bytes": 0}
    told = documents.query(
        "SELECT object, reason, count(*), sum(bytes) FROM docs JOIN verdicts USING (doc) "
        "GROUP BY ALL ORDER BY object, reason"
    )
    for number, reason, count, size in told:
        fact = facts[number]
        if reason is None:
            fact |= {"documents": count, "kept_bytes": int(size)}
        else:
            fact["dropped"][reason] = count
    for fact in facts:
        fact["dropped"] = dict(sorted(fact["dropped"].items()))
    for reason in ("duplicate", "near_duplicate"):
        rows = documents.query(
            "SELECT object, id, left(text, 120) FROM docs JOIN verdicts USING (doc) "
            f"WHERE reason = ? ORDER BY doc LIMIT {SAMPLES}",
            [reason],
        )
        if shown := [f"{sources[number].uri} {name}: {text}" for number, name, text in rows]:
            samples[reason] = shown


def _counts(
    settings: IngestSettings, documents: "Documents", facts: list[dict[str, Any]]
) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    for fact in facts:
        dropped.update(fact["dropped"])
    held_out = next(
        documents.query(f"SELECT count(*) {KEPT} AND share < ?", [settings.validation_share])
    )[0]
    kept = sum(fact["documents"] for fact in facts)
    counts = {
        "documents_in": sum(fact["documents_in"] for fact in facts),
        "documents": kept,
        "bytes": sum(fact["kept_bytes"] for fact in facts),
        "text_bytes_in": sum(fact["text_bytes_in"] for fact in facts),
        "dropped": dict(sorted(dropped.items())),
        "sources": facts,
        "train_documents": kept - held_out,
        "validation_documents": held_out,
    }
    for fact in (*facts, counts):
        assert fact["documents_in"] == fact["documents"] + sum(fact["dropped"].values()), fact
    return counts


def _kept(
    documents: "Documents", split: str, sources: "list[Source]", settings: IngestSettings
) -> "Iterator[Document]":
    from nudge.components.common.corpus import Document

    side = "<" if split == "validation" else ">="
    rows = documents.query(
        f"SELECT id, text, object {KEPT} AND share {side} ? ORDER BY sha256",
        [settings.validation_share],
    )
    for name, text, number in rows:
        yield Document(name, text, sources[number].uri)


def _check(settings: IngestSettings, counts: dict[str, Any], columns: str) -> None:
    documents_in, count, dropped = (counts[key] for key in ("documents_in", "documents", "dropped"))
    if documents_in == 0:
        raise UserError(f"the corpus is empty: {settings.data_uri} holds no document")
    reasons = ", ".join(f"{reason} {number}" for reason, number in dropped.items())
    if count == 0 and columns:
        raise UserError(
            f"{settings.data_uri} has no column {settings.text_column!r}, it has: {columns}; "
            "set ingest.text_column"
        )
    if count == 0:
        raise UserError(f"no document is left of {documents_in}; dropped: {reasons}")
    train, validation = counts["train_documents"], counts["validation_documents"]
    if not train or not validation:
        need = math.ceil(3 / settings.validation_share)
        raise UserError(
            f"the corpus is too small to split: {count} documents left of {documents_in} "
            f"(dropped: {reasons or 'none'}) gave {train} for training and "
            f"{validation} for validation; about {need} documents are needed, "
            "or a larger ingest.validation_share"
        )
