"""The texts to score: the held-out split, and those of each guard."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from nudge.components.common.artifacts.corpus import (
    Document,
    read_corpus,
    read_documents,
    text_sha256,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.readers import (
    Page,
    ReadOptions,
    Unreadable,
    hidden_part,
    read_stream,
    reason_unread,
)
from nudge.components.common.readers.parquet import is_metadata
from nudge.components.evaluate.settings import Guard

HELD_OUT = "held-out"
"""The name of the set that decides the verdict; the other sets have the names of guards."""


def held_out_documents(
    corpus: Path, selected_on: Sequence[int], most: int
) -> tuple[list[Document], bool]:
    """At most ``most`` documents of the validation split, the first in its (hashed) order.

    The documents at the positions ``selected_on``, whose loss chose training's checkpoint, are left
    out, because the checkpoint is better on them by selection. Among equal models, the best of 5
    checkpoints was promoted in 12.5 % of trials by the 40 documents that chose it, and in 4.1 % by
    40 others (1,500 trials; a last checkpoint in 3.9 %). If the others are too few for a verdict,
    all are scored and the second value is True.
    """
    count = read_corpus(corpus).splits["validation"].documents
    enough = count - len(selected_on) >= MIN_DOCUMENTS
    left_out = frozenset(selected_on if enough else ())
    documents = enumerate(read_documents(corpus, "validation"))
    kept = (document for position, document in documents if position not in left_out)
    return list(itertools.islice(kept, most)), bool(selected_on) and not enough


def guard_documents(guard: Guard) -> list[Document]:
    """The documents of a guard's files, sorted by file name.

    Raises `UserError` if there are too few, or if a file cannot be read as what its name says.
    """
    if is_local(guard.uri):
        return _documents(guard, _files(local_path(guard.uri)))
    if urlsplit(guard.uri).scheme != "s3":
        raise UserError(
            f"evaluate.guards {guard.name}: cannot read {guard.uri}; "
            "use package://, file://, a path or an s3:// folder"
        )
    from nudge.components.common.clients.storage import download_folder

    with tempfile.TemporaryDirectory() as folder:
        download_folder(guard.uri, Path(folder))
        return _documents(guard, _files(Path(folder)))


def texts_sha256(texts: list[str]) -> str:
    """Hex sha256 of a list of texts, over the sha256 of each text, one per line."""
    return text_sha256("".join(f"{text_sha256(text)}\n" for text in texts))


def _files(path: Path) -> list[Path]:
    """The files of a guard, without hidden files and, in a folder, files that are not text."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
        visible = (p for p in found if not hidden_part(p.relative_to(path).as_posix()))
        return [
            p for p in visible if reason_unread(p.name) != "not_text" and not is_metadata(p.name)
        ]
    if path.is_file():  # an existing name wins over a pattern
        return [path]
    return sorted(p for p in path.parent.glob(path.name) if p.is_file())


def _documents(guard: Guard, files: list[Path]) -> list[Document]:
    read = (
        Document(text_sha256(text)[:16], text, guard.uri)
        for path in files
        for text in _texts(guard, path)
        if text.strip()
    )
    documents = list(itertools.islice(read, guard.max_documents))
    if len(documents) < MIN_DOCUMENTS:
        raise UserError(
            f"evaluate.guards {guard.name}: {guard.uri} has {len(documents)} documents with text;"
            f" fewer than {MIN_DOCUMENTS} cannot show that nothing is lost: add more, or remove "
            "the guard"
        )
    return documents


def _texts(guard: Guard, path: Path) -> Iterator[str]:
    """The texts of one file. A guard is small and curated, so an unreadable part is an error."""
    # A file of unknown kind counts as text.
    name = f"{path.name}.txt" if reason_unread(path.name) else path.name
    try:
        with path.open("rb") as stream:
            for record in read_stream(stream, name, ReadOptions()):
                text = record.text.text() if isinstance(record.text, Page) else record.text
                if isinstance(text, Unreadable):
                    raise UserError(_unreadable(guard, path, record.name, text))
                assert isinstance(text, str)  # these options read no conversations
                yield text
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"evaluate.guards {guard.name}: {path.name} of {guard.uri} cannot be read: {why}"
        ) from None
    except ImportError as error:
        raise UserError(
            f"evaluate.guards {guard.name}: {path.name} needs the Python package {error.name}; "
            "install the extra: pip install 'nudge-lm[data]'"
        ) from None


def _unreadable(guard: Guard, path: Path, record: str, why: Unreadable) -> str:
    where = path.name if record in ("", path.name) else f"{path.name}, row {record}"
    detail = f" ({why.detail})" if why.detail else ""
    return (
        f"evaluate.guards {guard.name}: {where} of {guard.uri} cannot be read: {why.reason}{detail}"
        '; use UTF-8 text, JSON lines of {"text": ...}, or another format that ingest reads'
    )
