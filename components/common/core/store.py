"""Files in a folder or below an ``s3://`` URI, through one interface.

Each file is complete or absent. What several files make up becomes visible with its manifest: write
the manifest last. `Store.remove` and `Store.delete` delete it first.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import fsync, write_atomic

MANIFEST = "manifest.json"


class Missing(UserError):
    """A file that the store does not have."""


@dataclass(frozen=True)
class Stored:
    """A file of a store: its size in bytes, and when it was written, in seconds since the epoch."""

    bytes: int
    modified: float


class Store(Protocol):
    """A folder of files. Names are relative paths with ``/``.

    Failures raise `OSError` in a folder and `UserError` (`Transient` if a retry may help) in S3.
    """

    uri: str

    @property
    def folder(self) -> Path | None:
        """The folder itself, if it is on a disk."""
        ...

    def list(self, below: str = "") -> dict[str, Stored]:
        """Every file in the folder ``below``, by name."""
        ...

    def children(self) -> Set[str]:
        """The names of the files and folders at the top; a folder's ends in ``/``."""
        ...

    def read(self, name: str) -> bytes | None:
        """The content of a small file, or None if there is none."""
        ...

    def get(self, name: str, path: Path) -> None:
        """Copy a file to ``path``; raises `Missing` if there is none."""
        ...

    def write(self, name: str, body: bytes, *, replace: bool = True) -> bool:
        """Write a small file. With ``replace=False``, return False if it exists already."""
        ...

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, manifests and other JSON files first; missing files are no error."""
        ...

    def remove(self, below: str = "") -> None:
        """Delete the folder ``below`` with everything in it, in the order of `delete`."""
        ...


def deletion_order(name: str) -> tuple[bool, bool, str]:
    """The order of deletion: a manifest, other JSON files (they may be listings), the rest."""
    return not f"/{name}".endswith(f"/{MANIFEST}"), not name.endswith(".json"), name


class FolderStore:
    """A folder on a disk or a shared volume."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.uri = str(self.folder)

    def list(self, below: str = "") -> dict[str, Stored]:
        found = {}
        for path in (self.folder / below).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process may delete files
                if path.is_file():
                    stat = path.stat()
                    name = path.relative_to(self.folder).as_posix()
                    found[name] = Stored(stat.st_size, stat.st_mtime)
        return found

    def children(self) -> Set[str]:
        if not self.folder.is_dir():
            return set()
        return {f"{path.name}/" if path.is_dir() else path.name for path in self.folder.iterdir()}

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def get(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self.folder / name, path)
        except FileNotFoundError:
            raise Missing(f"{self.folder / name} does not exist") from None

    def write(self, name: str, body: bytes, *, replace: bool = True) -> bool:
        path = self.folder / name
        if replace:
            write_atomic(path, body)
            return True
        part = path.with_name(f".{path.name}.part-new-{os.getpid()}")
        write_atomic(part, body)
        try:
            path.hardlink_to(part)
        except FileExistsError:
            return False
        finally:
            part.unlink()
        return True

    def put(self, path: Path, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part-{os.getpid()}")
        try:
            shutil.copyfile(path, part)
            fsync(part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def delete(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=deletion_order):
            (self.folder / name).unlink(missing_ok=True)

    def remove(self, below: str = "") -> None:
        self.delete(name for name in self.list(below) if name.endswith(".json"))
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder / below)
