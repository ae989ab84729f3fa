"""The step `ingest`: turns sources into a clean, deduplicated and split corpus."""

import copy
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import published, write_atomic
from nudge.components.common.core.sample_size import corpus_size
from nudge.components.common.core.step import step
from nudge.components.ingest.settings import IngestSettings

if TYPE_CHECKING:
    from nudge.components.common.artifacts.corpus import Document
    from nudge.components.common.core.progress import Progress
    from nudge.components.ingest.duplicates import Documents
    from nudge.components.ingest.overlap import Overlap
    from nudge.components.ingest.sources import Source

KEPT = "FROM docs JOIN verdicts USING (doc) WHERE reason IS NULL"
GROUPS = 30
"""Licenses, and origins, that are counted one by one; the smaller groups are counted together."""
LANGUAGE_SAMPLE, LANGUAGE_CHARACTERS = 300, 1000


@step("ingest", outputs=("corpus", "report"), reuse=False)
def ingest(settings: IngestSettings, *, corpus: Path, report: Path) -> dict[str, Any]:
    """Read every source, drop what cannot be used, and split the rest.

    ``corpus`` becomes a corpus artifact (`nudge.components.common.artifacts.corpus`), ``report`` an
    HTML page. In total and for each source, ``documents_in`` is ``documents`` plus every count in
    ``dropped``, and ``text_bytes_in`` is ``text_bytes_kept`` plus every count in ``dropped_bytes``;
    ``bytes`` is the size of the kept texts after cleaning.

    Documents are stored in tables beside ``corpus``, so that memory does not grow with their
    number. With ``settings.state_uri``, only new and changed objects are read. With
    ``settings.engine: ray``, the nodes of a cluster read them. The corpus is the same in every
    case. Raises `UserError` if a source is missing, if more is lost than ``settings.max_lost``
    allows, or if too little is left to split.
    """
    from nudge.components.ingest.pieces import AUTOMATIC, piece_size

    try:
        return _ingest(settings, corpus, report)
    except _TooFew as error:
        if settings.split_characters or error.longest <= AUTOMATIC:
            raise
        # One book, or a few: repeat in pieces.
        size = piece_size(error.characters, settings.validation_share)
        return _ingest(dataclasses.replace(settings, split_characters=size), corpus, report)


class _TooFew(UserError):
    """There are too few documents to hold any out; ``longest`` is the longest one, and
    ``characters`` are those of all of them."""

    longest = characters = 0


def _ingest(settings: IngestSettings, corpus: Path, report: Path) -> dict[str, Any]:
    from nudge.components.common.artifacts.corpus import SPLITS, write_corpus
    from nudge.components.common.core.progress import progress
    from nudge.components.ingest.account import account, check_conversations, check_loss
    from nudge.components.ingest.downloads import WebLimits
    from nudge.components.ingest.duplicates import Documents
    from nudge.components.ingest.filters import make_filters
    from nudge.components.ingest.finding import sources_of
    from nudge.components.ingest.forgetting import forget
    from nudge.components.ingest.mix import apply_mix
    from nudge.components.ingest.new_text import is_new
    from nudge.components.ingest.overlap import overlap_of, texts_to_keep_out
    from nudge.components.ingest.state import IngestState
    from nudge.components.ingest.twins import judge

    make_filters(settings)  # report what a filter lacks before anything is read
    keep_out = overlap_of(texts_to_keep_out(settings))
    limits = WebLimits(settings.allow_private_addresses, settings.max_download_bytes)
    sources = sources_of(settings, limits)
    corpus.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ingest-", dir=corpus.parent) as folder:
        documents = Documents(Path(folder))
        state = (
            IngestState(settings.state_uri, settings, Path(folder), keep_out.sha256)
            if settings.state_uri
            else None
        )
        with progress("ingest", total=len(sources), unit="files") as bar:
            old = state.restore(sources, documents) if state else {}
            read = _read_all(sources, old, settings, documents, keep_out, bar)
            bar.note(stage="looking for duplicates")
            documents.find_duplicates(settings.near_duplicates)
            if settings.forget:
                forget(documents, settings.forget, [source.uri for source in sources])
            judge(documents, settings.repeated_prompts)
            apply_mix(documents, sources, settings)
            facts = [copy.deepcopy(read[number]) for number in range(len(sources))]
            columns = [fact.pop("columns") for fact in facts]
            samples = _samples([fact.pop("samples") for fact in facts])
            samples |= _count_duplicates(documents, sources, facts)
            counts = _counts(settings, documents, facts)
            _check(settings, counts, next(filter(None, columns), ""))
            check_conversations(counts, documents.conversations)
            check_loss(counts, settings.max_lost)
            sizes = "coalesce(max(characters), 0), coalesce(sum(characters), 0)::BIGINT"
            longest, characters = next(documents.query(f"SELECT {sizes} {KEPT} AND turns IS NULL"))
            _check_split(settings, counts, longest, characters)
            bar.note(stage="writing")
            with published(corpus) as part:
                place = Path(folder)
                kept = {s: _kept(documents, s, sources, settings, place) for s in SPLITS}
                fingerprint = write_corpus(part, kept, counts)
            if state:
                lasting = {n: fact for n, fact in read.items() if not fact["lost"]}
                state.keep(sources, lasting, set(old), documents)
        page = _page(documents, settings, counts, fingerprint, samples)
        documents.close()
    write_atomic(report, page)
    return {
        "account": account(counts),
        "read": counts["documents_in"],
        "dropped": counts["dropped"],
        "documents": counts["documents"],
        "conversations": counts["conversations"],
        "train_documents": counts["train_documents"],
        "validation_documents": counts["validation_documents"],
        "bytes": counts["bytes"],
        "objects": len(sources),
        "objects_read": len(sources) - len(old),
        "fingerprint": fingerprint,
        "new": int(is_new(settings, fingerprint)),
    }


def _page(
    documents: "Documents",
    settings: IngestSettings,
    counts: dict[str, Any],
    fingerprint: str,
    samples: dict[str, list[str]],
) -> str:
    """The report: the counts, the lengths of texts, and some of what is held out and dropped."""
    from nudge.components.ingest.report import render_report

    lengths = documents.query(
        f"SELECT 1::BIGINT << floor(log2(characters))::INT AS low, count(*) {KEPT} "
        "GROUP BY low ORDER BY low"
    )
    held_out = documents.query(
        f"SELECT turns IS NOT NULL, text_at, bytes {KEPT} AND side < ? ORDER BY sha256 LIMIT 3",
        [settings.validation_share],
    )
    shown = [documents.plain_text(*row)[:600] for row in held_out]
    return render_report(counts, fingerprint, dict(lengths), samples, shown)


def _read_all(
    sources: "list[Source]",
    known: dict[int, dict[str, Any]],
    settings: IngestSettings,
    documents: "Documents",
    keep_out: "Overlap",
    bar: "Progress",
) -> dict[int, dict[str, Any]]:
    """Read each object that is not ``known``; returns the facts of all objects by number."""
    from nudge.components.ingest.reading import read_objects

    if known:
        bar.advance(len(known), unchanged=len(known))
    new = {number: source for number, source in enumerate(sources) if number not in known}
    if settings.engine == "ray":
        from nudge.components.ingest.on_ray import read_on_ray

        return {**known, **read_on_ray(new, settings, documents, keep_out, bar)}
    return {**known, **read_objects(new, settings, documents, keep_out, bar)}


def _samples(by_object: list[dict[str, list[str]]]) -> dict[str, list[str]]:
    """The first samples of each reason over all objects."""
    from nudge.components.ingest.cleaning import SAMPLES

    merged: dict[str, list[str]] = {}
    for samples in by_object:
        for reason, examples in samples.items():
            shown = merged.setdefault(reason, [])
            shown += examples[: SAMPLES - len(shown)]
    return merged


def _count_duplicates(
    documents: "Documents", sources: "list[Source]", facts: list[dict[str, Any]]
) -> dict[str, list[str]]:
    """Add the results of `find_duplicates` to each source's facts; returns samples of the dropped
    documents."""
    from nudge.components.ingest.account import DUPLICATES
    from nudge.components.ingest.cleaning import SAMPLE_CHARACTERS, SAMPLES

    for fact in facts:
        fact |= {"documents": 0, "kept_bytes": 0, "text_bytes_kept": 0}
    verdicts = documents.query(
        "SELECT object, reason, count(*), sum(bytes)::BIGINT, sum(raw_bytes)::BIGINT "
        "FROM docs JOIN verdicts USING (doc) GROUP BY ALL ORDER BY object, reason"
    )
    for number, reason, count, size, raw_size in verdicts:
        fact = facts[number]
        if reason is None:
            fact |= {"documents": count, "kept_bytes": size, "text_bytes_kept": raw_size}
        else:
            fact["dropped"][reason] = count
            fact["dropped_bytes"][reason] = raw_size
    for fact in facts:
        for key in ("dropped", "dropped_bytes"):
            fact[key] = dict(sorted(fact[key].items()))
    samples = {}
    for reason in DUPLICATES:
        rows = documents.query(
            "SELECT object, id, turns IS NOT NULL, text_at, bytes "
            f"FROM docs JOIN verdicts USING (doc) WHERE reason = ? ORDER BY doc LIMIT {SAMPLES}",
            [reason],
        )
        shown = [
            f"{sources[number].uri} {name}: {documents.plain_text(*place)[:SAMPLE_CHARACTERS]}"
            for number, name, *place in rows
        ]
        if shown:
            samples[reason] = shown
    return samples


def _counts(
    settings: IngestSettings, documents: "Documents", facts: list[dict[str, Any]]
) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    dropped_bytes: Counter[str] = Counter()
    encodings: Counter[str] = Counter()
    for fact in facts:
        encodings.update(fact.pop("encodings"))
        assert not fact.pop("lost") or not fact["documents"], fact
        dropped.update(fact["dropped"])
        dropped_bytes.update(fact["dropped_bytes"])
    held_out = next(
        documents.query(f"SELECT count(*) {KEPT} AND side < ?", [settings.validation_share])
    )[0]
    kept = sum(fact["documents"] for fact in facts)
    counts: dict[str, Any] = {
        "documents_in": sum(fact["documents_in"] for fact in facts),
        "documents": kept,
        "conversations": next(documents.query(f"SELECT count(*) {KEPT} AND turns IS NOT NULL"))[0],
        "bytes": sum(fact["kept_bytes"] for fact in facts),
        "text_bytes_in": sum(fact["text_bytes_in"] for fact in facts),
        "text_bytes_kept": sum(fact["text_bytes_kept"] for fact in facts),
        "dropped": dict(sorted(dropped.items())),
        "dropped_bytes": dict(sorted(dropped_bytes.items())),
        "encodings": dict(sorted(encodings.items())),
        "sources": facts,
        "train_documents": kept - held_out,
        "validation_documents": held_out,
        "languages": _languages(documents),
    }
    for fact in (*facts, counts):
        assert fact["documents_in"] == fact["documents"] + sum(fact["dropped"].values()), fact
        lost_bytes = sum(fact["dropped_bytes"].values())
        assert fact["text_bytes_in"] == fact["text_bytes_kept"] + lost_bytes, fact
    if settings.mix:
        from nudge.components.ingest.mix import mix_of

        counts["mix"] = mix_of(documents, settings)
    if settings.license_column:
        counts["licenses"] = _groups(documents, "license", kept)
    if settings.source_column:
        counts["origins"] = _groups(documents, "origin", kept)
    return counts


def _groups(documents: "Documents", column: str, total: int) -> list[dict[str, Any]]:
    """Kept documents by a column's values, largest first; the last group may combine many."""
    rows = documents.query(
        f"SELECT {column}, count(*) AS n, sum(bytes)::BIGINT {KEPT} "
        f"GROUP BY {column} ORDER BY n DESC, {column} LIMIT {GROUPS}"
    )
    groups = [{"value": v or None, "documents": n, "bytes": size} for v, n, size in rows]
    size, values = next(
        documents.query(f"SELECT sum(bytes)::BIGINT, count(DISTINCT {column}) {KEPT}")
    )
    if rest := total - sum(group["documents"] for group in groups):
        others = {"documents": rest, "bytes": size - sum(group["bytes"] for group in groups)}
        groups.append({"value": None, "others": values - GROUPS, **others})
    return groups


def _languages(documents: "Documents") -> dict[str, int]:
    """The languages of a sample of kept documents, drawn by hash; most frequent first."""
    import py3langid

    rows = documents.query(
        f"SELECT turns IS NOT NULL, text_at, bytes {KEPT} ORDER BY sha256 LIMIT {LANGUAGE_SAMPLE}"
    )
    texts = (documents.plain_text(*place)[:LANGUAGE_CHARACTERS] for place in rows)
    found = Counter(py3langid.classify(text)[0] for text in texts)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _kept(
    documents: "Documents",
    split: str,
    sources: "list[Source]",
    settings: IngestSettings,
    folder: Path,
) -> "Iterator[Document]":
    from nudge.components.common.artifacts.corpus import Document
    from nudge.components.common.chat.conversation import from_json
    from nudge.components.ingest.ordering import in_hash_order

    kept = f"{KEPT} AND side {'<' if split == 'validation' else '>='} ?"
    edge = [settings.validation_share]
    size = next(documents.query(f"SELECT coalesce(sum(bytes), 0)::BIGINT {kept}", edge))[0]
    found = documents.query(
        "SELECT sha256, text_at, bytes, id, object, license, origin, turns IS NOT NULL " + kept,
        edge,
    )
    rows = ((sha256, documents.text(at, n), *rest) for sha256, at, n, *rest in found)
    for _, body, name, number, license, origin, is_chat in in_hash_order(rows, size, folder):
        text, conversation = ("", from_json(body)) if is_chat else (body, None)
        yield Document(name, text, sources[number].uri, license, origin, conversation)


def _check(settings: IngestSettings, counts: dict[str, Any], columns: str) -> None:
    documents_in, count, dropped = (counts[key] for key in ("documents_in", "documents", "dropped"))
    if documents_in == 0:
        raise UserError(f"the corpus is empty: {settings.where} has no documents")
    reasons = ", ".join(f"{reason} {number}" for reason, number in dropped.items())
    if count == 0 and columns:
        raise UserError(
            f"{settings.where} has no column {settings.text_column!r}; it has: {columns}; "
            "set ingest.text_column to the one with the text, or rename the columns of a "
            "conversation (messages, or prompt and completion, or question and answer)"
        )
    if count == 0:
        raise UserError(f"no document is left of {documents_in}; dropped: {reasons}")
    for key, setting in (("licenses", "license_column"), ("origins", "source_column")):
        if not any(group["value"] for group in counts.get(key, [{"value": True}])):
            raise UserError(
                f"ingest.{setting} is {getattr(settings, setting)!r}, but no document of "
                f"{settings.where} has a value in that column; correct the name, or remove the "
                "setting"
            )


def _check_split(
    settings: IngestSettings, counts: dict[str, Any], longest: int, characters: int
) -> None:
    documents_in, count, dropped = (counts[key] for key in ("documents_in", "documents", "dropped"))
    reasons = ", ".join(f"{reason} {number}" for reason, number in dropped.items())
    train, validation = counts["train_documents"], counts["validation_documents"]
    if not train or not validation:
        need = corpus_size(settings.validation_share)
        error = _TooFew(
            f"the corpus is too small to split: {count} of {documents_in} documents were kept "
            f"(dropped: {reasons or 'none'}), which gives {train} for training and "
            f"{validation} for validation; bring about {need} documents, raise "
            "ingest.validation_share, or set ingest.split_characters to split long documents"
        )
        error.longest, error.characters = longest, characters
        raise error
