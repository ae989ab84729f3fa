"""The step `ingest`: sources in, a clean, deduplicated and split corpus out."""

import hashlib
import hmac
import math
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from nudge.components.common.errors import UserError
from nudge.components.common.publish import published, write_atomic
from nudge.components.common.step import step
from nudge.components.ingest.settings import IngestSettings

SAMPLES = 5


@step("ingest", outputs=("corpus", "report"), reuse=False)
def ingest(settings: IngestSettings, *, corpus: Path, report: Path) -> dict[str, Any]:
    """Read every source, drop what cannot be used, split the rest.

    ``corpus`` becomes a corpus artifact (`nudge.components.common.corpus`), ``report`` a page.
    ``documents_in`` is ``documents`` plus every count in ``dropped``. Raises `UserError` if a
    source is missing or nothing that could be split is left.
    """
    from nudge.components.common.corpus import Document, text_sha256, write_corpus
    from nudge.components.common.progress import progress
    from nudge.components.ingest.duplicates import signature
    from nudge.components.ingest.novelty import is_new
    from nudge.components.ingest.report import render_report
    from nudge.components.ingest.sources import Undecodable, find_sources, read_records

    sources = find_sources(settings.data_uri)
    dropped: Counter[str] = Counter()
    samples: dict[str, list[str]] = {}
    kept: dict[str, list[Document]] = {"train": [], "validation": []}
    seen: set[str] = set()
    buckets: set[bytes] = set()
    documents_in, facts = 0, []
    with progress("ingest", total=len(sources), unit="files") as bar:
        for source in sources:
            before = documents_in
            digest, kept_here = hashlib.sha256(), 0
            for name, raw in read_records(source, settings):
                documents_in += 1
                text = raw if isinstance(raw, Undecodable) else normalise(raw)
                reason = _unusable(text, settings)
                if reason is None and isinstance(text, str):
                    sha256 = text_sha256(text)
                    digest.update(sha256.encode())
                    if sha256 in seen:
                        reason = "duplicate"
                    elif settings.near_duplicates:
                        keys = signature(text)
                        reason = None if buckets.isdisjoint(keys) else "near_duplicate"
                        buckets.update(keys)
                    seen.add(sha256)
                if reason is not None:
                    dropped[reason] += 1
                    shown = samples.setdefault(reason, [])
                    if len(shown) < SAMPLES:
                        shown.append(f"{source.uri} {name}: {str(text)[:120]}")
                    continue
                assert isinstance(text, str)
                kept_here += 1
                kept[split_of(text, settings)].append(Document(name, text, source.uri))
            facts.append(
                {
                    "uri": source.uri,
                    "bytes": source.size(),
                    "documents_in": documents_in - before,
                    "documents": kept_here,
                    "sha256": digest.hexdigest(),
                }
            )
            bar.advance(1, documents=documents_in, kept=sum(map(len, kept.values())))
    _check(settings, documents_in, dropped, kept)
    counts = {
        "documents_in": documents_in,
        "documents": sum(map(len, kept.values())),
        "bytes": sum(len(d.text.encode()) for part in kept.values() for d in part),
        "dropped": dict(sorted(dropped.items())),
        "sources": facts,
    }
    with published(corpus) as part:
        fingerprint = write_corpus(part, kept, counts)
    write_atomic(report, render_report(counts, fingerprint, kept, samples))
    return {
        "documents": counts["documents"],
        "train_documents": len(kept["train"]),
        "validation_documents": len(kept["validation"]),
        "bytes": counts["bytes"],
        "fingerprint": fingerprint,
        "new": int(is_new(settings, fingerprint)),
    }


def normalise(text: str) -> str:
    """Unicode NFC, plain newlines, no NUL, no blank edges."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return unicodedata.normalize("NFC", text).strip()


def split_of(text: str, settings: IngestSettings) -> str:
    """The split of a document: a keyed hash of its text, so it stays there as the corpus grows."""
    key = str(settings.seed).encode()
    digest = hmac.digest(key, text.encode(), "sha256")
    share = int.from_bytes(digest[:8]) / 2**64
    return "validation" if share < settings.validation_share else "train"


def _unusable(text: Any, settings: IngestSettings) -> str | None:
    if not isinstance(text, str):
        return str(text.reason)  # an Undecodable
    if len(text) < settings.min_characters:
        return "too_short"
    if len(text) > settings.max_characters:
        return "too_long"
    return None


def _check(
    settings: IngestSettings,
    documents_in: int,
    dropped: Counter[str],
    kept: dict[str, list[Any]],
) -> None:
    if documents_in == 0:
        raise UserError(f"the corpus is empty: {settings.data_uri} holds no document")
    count = sum(map(len, kept.values()))
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(dropped.items()))
    if count == 0:
        raise UserError(f"no document is left of {documents_in}; dropped: {reasons}")
    if not kept["train"] or not kept["validation"]:
        need = math.ceil(3 / settings.validation_share)
        raise UserError(
            f"the corpus is too small to split: {count} documents left of {documents_in} "
            f"(dropped: {reasons or 'none'}) gave {len(kept['train'])} for training and "
            f"{len(kept['validation'])} for validation; about {need} documents are needed, "
            "or a larger ingest.validation_share"
        )
