"""Where checkpoints are stored: a folder (a disk, a shared volume) or an s3:// URI.

A checkpoint is a folder of files with a manifest that is written last. It is either complete or
invisible: a folder gets its final name once it is complete, and in S3 a checkpoint exists only once
its manifest does.
"""

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.clients.store import open_store
from nudge.components.common.core.publish import read_manifest, write_manifest
from nudge.components.common.core.store import MANIFEST

FORMAT, VERSION = "nudge.checkpoint", 1
LOCK = ".lock"

OURS = re.compile(r"step-\d+/|\.step-\d+\.part-.*/")
"""The folder of a checkpoint, and one in which ranks write it."""


class CheckpointStore:
    """The checkpoints of one run, at a folder's path, a ``file://`` URI or an ``s3://`` URI."""

    def __init__(self, uri: str) -> None:
        self._store = open_store(uri)
        self.uri, self._root = self._store.uri, self._store.folder

    def staging(self, name: str, token: int) -> Path:
        """The local folder in which the ranks write checkpoint ``name``; ``token`` is the same on
        all ranks of one run and differs between runs."""
        if self._root is None:
            return Path(tempfile.mkdtemp(prefix=f"nudge-{name}-"))
        folder = self._root / f".{name}.part-{token}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def upload(self, name: str, files: list[Path]) -> None:
        """Copy this rank's files to the store; the checkpoint stays invisible."""
        if self._root is None:
            for path in files:
                self._store.put(path, f"{name}/{path.name}")

    def publish(self, name: str, folder: Path, manifest: dict[str, Any]) -> None:
        """Make the checkpoint visible; called on one rank, once every rank has uploaded."""
        write_manifest(folder / MANIFEST, FORMAT, VERSION, manifest)
        if self._root is None:
            self._store.put(folder / MANIFEST, f"{name}/{MANIFEST}")
        else:
            self.remove(name)
            folder.rename(self._root / name)

    def names(self) -> list[str]:
        """The names of the complete checkpoints, oldest first."""
        found = (re.fullmatch(rf"(step-[^/]*)/{MANIFEST}", name) for name in self._store.list())
        return sorted(match[1] for match in found if match)

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a complete checkpoint; raises `UserError` if there is none."""
        if self._root is not None:
            return read_manifest(self._root / name / MANIFEST, FORMAT, VERSION)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name / MANIFEST
            self._store.get(f"{name}/{MANIFEST}", path)
            return read_manifest(path, FORMAT, VERSION)

    def on_disk(self, name: str) -> Path | None:
        """The checkpoint's folder if every rank can read it directly, else None."""
        return self._root / name if self._root else None

    def fetch(self, name: str, into: Path) -> None:
        """Copy the checkpoint's files into a local folder."""
        for file in (MANIFEST, *self.manifest(name)["files"]):
            self._store.get(f"{name}/{Path(file).name}", into / Path(file).name)

    def remove(self, name: str) -> None:
        """Make the checkpoint invisible, then delete it."""
        self._store.remove(name)

    def clear(self, keep: list[str]) -> None:
        """Remove everything but ``keep``: other checkpoints, and files that a killed run left."""
        for name in self._store.children():
            if OURS.fullmatch(name) and name.rstrip("/") not in keep:
                self._store.remove(name)

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[bool]:
        """Hold the store's lock while open, and yield True.

        If another process holds it, yield False at once or, with ``wait``, wait until it is free.
        There is no lock in S3.
        """
        if self._root is None:
            yield True
            return
        file = _locked_file(self._root, 0 if wait else fcntl.LOCK_NB)
        if file is None:
            yield False
            return
        try:
            yield True
        finally:
            (self._root / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it contains checkpoints or someone else's files
                self._root.rmdir()
            os.close(file)

    def remove_abandoned(self, age_s: float) -> None:
        """Remove sibling stores that are unlocked and were last written over ``age_s`` ago. In S3 a
        bucket's lifecycle rules can do this."""
        if self._root is None:
            return
        for root in self._root.parent.iterdir():
            if root == self._root or not re.fullmatch(r"[0-9a-f]{16}", root.name):
                continue
            with contextlib.suppress(FileNotFoundError):  # another run may remove it, too
                written = max(path.stat().st_mtime for path in (root, *root.iterdir()))
                if time.time() - written > age_s:
                    other = CheckpointStore(str(root))
                    with other.lock() as acquired:
                        if acquired:
                            other.clear([])


def _locked_file(root: Path, flag: int) -> int | None:
    """The lock file, locked until it is closed, at the latest when the process ends."""
    while True:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the last holder just removed the folder
            file = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | flag)
            except BlockingIOError:
                os.close(file)
                return None
            except OSError:  # the file system has no locks
                return file
            if os.fstat(file).st_nlink:
                return file
            os.close(file)
