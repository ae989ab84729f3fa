"""Which corpora, runs and versions learned a document.

A run's corpus lists every document with its text; of a run whose artifacts `nudge clean` removed,
`fingerprints.jsonl.zst` lists each document's sha256, id, source and split. A version also knows
what the version before it learned, if it continued from its weights.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.corpus import (
    MANIFEST,
    SPLITS,
    read_corpus,
    read_documents,
    text_sha256,
    zstd,
)
from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.local.state_file import Damaged, read_object
from nudge.components.common.readers import Page, Unreadable, read_stream, reason_unread
from nudge.components.ingest import conversations
from nudge.components.ingest.filters import make_filters, normalize
from nudge.components.ingest.settings import IngestSettings
from nudge.pipelines.local import history

FINGERPRINTS = "fingerprints.jsonl.zst"
SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{8,64})")
CONTAINED = 20
"""The shortest text, in characters, that is also searched for within documents."""


@dataclass(frozen=True)
class Wanted:
    """What to look for: exact texts by sha256, the beginning of a sha256, an id, and a text that a
    document may contain."""

    sha256: frozenset[str] = frozenset()
    begins: str = ""
    id: str = ""
    source: str = ""
    part: str = ""

    def fits(self, sha256: str, name: str, source: str, text: str = "") -> bool:
        """Whether a document is meant."""
        return (
            sha256 in self.sha256
            or bool(self.begins and sha256.startswith(self.begins))
            or bool(self.id and name == self.id)
            or bool(self.source and source == self.source)
            or bool(self.part and text and self.part in text)
        )


@dataclass(frozen=True)
class Found:
    """A document in a run's corpus."""

    sha256: str
    id: str
    source: str
    split: str
    """``train``: the run's model learned it. ``validation``: it was only judged with it."""
    run_id: str
    recipe: str
    state: str
    model: str
    version: str
    """Empty if the run registered none."""
    corpus: str
    """The fingerprint of the run's corpus."""
    through: str = ""
    """The version whose weights this one continued from, if it learned the document from there."""


def wanted(document: str) -> Wanted:
    """What a command line means: a file, the digits of a sha256, an id, or the text itself.

    A file's documents are read and cleaned as ingest does by default. Raises `UserError` if the
    file has no text.
    """
    path = Path(document)
    is_file = False
    with contextlib.suppress(OSError, ValueError):  # a text may be longer than a name can be
        is_file = path.is_file()
    if is_file:
        return Wanted(frozenset(_texts_of(path)), source=path.absolute().as_uri())
    if match := SHA256.fullmatch(document):
        return Wanted(begins=match[1], id=document)
    text = _clean(document)
    return Wanted(
        frozenset({text_sha256(text)}),
        id=document,
        part=text if len(text) >= CONTAINED else "",
    )


def _texts_of(path: Path) -> Iterator[str]:
    if why := reason_unread(path.name):
        raise UserError(f"{path} is not read ({why}); name a file that ingest reads, or its text")
    count, settings = 0, IngestSettings(data_uri=(str(path),))
    with path.open("rb") as stream:
        for record in read_stream(stream, path.name, settings.reading):
            found = record.text.text() if isinstance(record.text, Page) else record.text
            if isinstance(found, Conversation):
                found = conversations.cleaned(found, settings)
            if not isinstance(found, Unreadable):
                count += 1
                body = _clean(found) if isinstance(found, str) else found.to_json()
                yield text_sha256(body)
    if not count:
        raise UserError(f"{path} has no text that ingest reads")


def _clean(text: str) -> str:
    """A text as ingest keeps it by default; as it is if ingest would drop it."""
    kept = normalize(text)
    for apply in make_filters(IngestSettings(data_uri=(".",), min_characters=1)):
        changed = apply(kept)
        if not isinstance(changed, str):
            return kept
        kept = changed
    return kept


def trace(home: Path, looked_for: Wanted) -> list[Found]:
    """Every run whose corpus has the document, newest first, then the versions that continued from
    those."""
    found: list[Found] = []
    runs = history.runs(home)
    for run in runs:
        rows = {row.sha256: row for row in _in_run(run, looked_for)}
        found += rows.values()
    return [*found, *_through_base(runs, found)]


def _in_run(run: history.PastRun, looked_for: Wanted) -> Iterator[Found]:
    corpus = run.output("ingest", "corpus")
    facts = {
        "run_id": run.run_id,
        "recipe": run.recipe,
        "state": run.state,
        "model": run.model,
        "version": run.version,
    }
    if corpus and (corpus / MANIFEST).is_file():
        fingerprint = read_corpus(corpus).fingerprint
        for split in SPLITS:
            for each in read_documents(corpus, split):
                digest = text_sha256(each.body)
                if looked_for.fits(digest, each.id, each.source, each.plain_text):
                    yield Found(digest, each.id, each.source, split, corpus=fingerprint, **facts)
        return
    for row in _fingerprints(run.folder / FINGERPRINTS):
        digest, name, source, split, fingerprint = (
            str(row.get(key, "")) for key in ("sha256", "id", "source", "split", "corpus")
        )
        if looked_for.fits(digest, name, source):
            yield Found(digest, name, source, split, corpus=fingerprint, **facts)


def _fingerprints(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    try:
        with zstd.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value
    except (OSError, ValueError, EOFError, zstd.ZstdError):
        raise UserError(
            f"{path} is damaged, so it is not known which documents that run learned; delete the "
            f"file to trace in the other runs (nudge runs delete {path.parent.name} deletes the "
            "run)"
        ) from None


def keep_fingerprints(folder: Path) -> None:
    """Write a run's fingerprints before its corpus is removed; does nothing without a corpus."""
    run = history.read_run(folder)
    corpus = run.output("ingest", "corpus")
    if not corpus or not (corpus / MANIFEST).is_file() or (folder / FINGERPRINTS).is_file():
        return
    fingerprint = read_corpus(corpus).fingerprint
    lines = (
        json.dumps(
            {
                "sha256": text_sha256(each.body),
                "id": each.id,
                "source": each.source,
                "split": split,
                "corpus": fingerprint,
            }
        )
        for split in SPLITS
        for each in read_documents(corpus, split)
    )
    part = folder / f".{FINGERPRINTS}.part"
    with zstd.open(part, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    part.replace(folder / FINGERPRINTS)


def keep_lineage(folder: Path) -> None:
    """Copy what a run's model says about itself beside its result, before the model is removed."""
    model = history.read_run(folder).output("train", "model")
    if model and (model / "nudge.json").is_file():
        write_atomic(folder / "nudge.json", (model / "nudge.json").read_bytes())


def _through_base(runs: Iterable[history.PastRun], found: list[Found]) -> Iterator[Found]:
    """The runs whose base model is the model of a run that learned the document, and so on."""
    lineage = {run.run_id: _lineage(run) for run in runs}
    learned = {row.run_id: row for row in reversed(found) if row.split == "train"}
    for run in sorted(runs, key=lambda each: each.run_id):
        base = lineage[run.run_id][0]
        if run.run_id in learned or not base:
            continue
        before = next((row for run_id, row in learned.items() if lineage[run_id][1] == base), None)
        if before is None:
            continue
        row = replace(
            before,
            run_id=run.run_id,
            recipe=run.recipe,
            state=run.state,
            model=run.model,
            version=run.version,
            through=before.version or before.run_id,
        )
        learned[run.run_id] = row
        yield row


def _lineage(run: history.PastRun) -> tuple[str, str]:
    """The sha256 of a run's base model and of its own weights; empty where unknown."""
    model = run.output("train", "model")
    for path in (*([model / "nudge.json"] if model else []), run.folder / "nudge.json"):
        try:
            facts = read_object(path, "")
        except (FileNotFoundError, Damaged):
            continue
        base = facts.get("base_model")
        training = facts.get("weights_sha256") or facts.get("model_sha256")
        return (
            str(base.get("sha256") or "") if isinstance(base, dict) else "",
            str(training or ""),
        )
    return "", ""


def plain(found: Iterable[Found]) -> list[dict[str, Any]]:
    """The findings as JSON values."""
    return [asdict(each) for each in found]
