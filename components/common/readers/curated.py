"""Reads a small curated set of texts, such as a guard: an unreadable part of it is an error."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.uris import is_local, local_path, scheme_of
from nudge.components.common.readers.names import hidden_part
from nudge.components.common.readers.parquet import is_metadata
from nudge.components.common.readers.records import Page, ReadOptions
from nudge.components.common.readers.registry import read_stream, reason_unread
from nudge.components.common.readers.unreadable import Unreadable


def curated_texts(uri: str, where: str, most: int | None = None) -> list[str]:
    """The texts at a URI in the order of the file names, at most ``most`` of them.

    ``where`` names the setting in messages, such as ``evaluate.guards plain English``. Raises
    `UserError` if the URI cannot be read, or if a file is not what its name says.
    """
    if is_local(uri):
        return list(itertools.islice(_texts(uri, where, _files(local_path(uri))), most))
    if scheme_of(uri) != "s3":
        raise UserError(
            f"{where}: cannot read {uri}; use package://, file://, a path or an s3:// folder"
        )
    from nudge.components.common.clients.bucket import download_folder

    with tempfile.TemporaryDirectory() as folder:
        download_folder(uri, Path(folder))
        return list(itertools.islice(_texts(uri, where, _files(Path(folder))), most))


def _files(path: Path) -> list[Path]:
    """The files at a path, without hidden files and, in a folder, files that are not text."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
        visible = (p for p in found if not hidden_part(p.relative_to(path).as_posix()))
        return [
            p for p in visible if reason_unread(p.name) != "not_text" and not is_metadata(p.name)
        ]
    if path.is_file():  # an existing name wins over a pattern
        return [path]
    return sorted(p for p in path.parent.glob(path.name) if p.is_file())


def _texts(uri: str, where: str, files: list[Path]) -> Iterator[str]:
    for path in files:
        # A file of unknown kind counts as text.
        name = f"{path.name}.txt" if reason_unread(path.name) else path.name
        try:
            with path.open("rb") as stream:
                for record in read_stream(stream, name, ReadOptions()):
                    text = record.text.text() if isinstance(record.text, Page) else record.text
                    if isinstance(text, Unreadable):
                        row = "" if record.name in ("", path.name) else f", row {record.name}"
                        raise UserError(_unreadable(uri, where, f"{path.name}{row}", text))
                    assert isinstance(text, str)  # these options read no conversations
                    if text.strip():
                        yield text
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError(f"{where}: {path.name} of {uri} cannot be read: {why}") from None
        except ImportError as error:
            raise UserError(
                f"{where}: {path.name} needs the Python package {error.name}; "
                "install the extra: pip install 'nudge-lm[data]'"
            ) from None


def _unreadable(uri: str, where: str, part: str, why: Unreadable) -> str:
    detail = f" ({why.detail})" if why.detail else ""
    return (
        f"{where}: {part} of {uri} cannot be read: {why.reason}{detail}; "
        'use UTF-8 text, JSON lines of {"text": ...}, or another format that ingest reads'
    )
