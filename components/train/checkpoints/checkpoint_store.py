"""Where checkpoints are stored: a folder (a disk, a shared volume) or an s3:// URI.

A checkpoint is a folder of files with a manifest that is written last. It is either complete or
invisible: a folder gets its final name once it is complete, and in S3 a checkpoint exists only once
its manifest does.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from nudge.components.common.core.publish import read_manifest, write_manifest
from nudge.components.common.core.uris import is_local, local_path

FORMAT, VERSION = "nudge.checkpoint", 1
MANIFEST = "manifest.json"
LOCK = ".lock"


class CheckpointStore(Protocol):
    """A store for the checkpoints of one run."""

    uri: str

    def staging(self, name: str, token: int) -> Path:
        """The local folder in which the ranks write checkpoint ``name``; ``token`` is the same on
        all ranks of one run and differs between runs."""
        ...

    def upload(self, name: str, files: list[Path]) -> None:
        """Copy this rank's files to the store; the checkpoint stays invisible."""
        ...

    def publish(self, name: str, folder: Path, manifest: dict[str, Any]) -> None:
        """Make the checkpoint visible; called on one rank, once every rank has uploaded."""
        ...

    def names(self) -> list[str]:
        """The names of the complete checkpoints, oldest first."""
        ...

    def manifest(self, name: str) -> dict[str, Any]: ...

    def on_disk(self, name: str) -> Path | None:
        """The checkpoint's folder if every rank can read it directly, else None."""
        ...

    def fetch(self, name: str, into: Path) -> None:
        """Copy the checkpoint's files into a local folder."""
        ...

    def remove(self, name: str) -> None:
        """Make the checkpoint invisible, then delete it."""
        ...

    def clear(self, keep: list[str]) -> None:
        """Remove everything but ``keep``: other checkpoints, and files that a killed run left."""
        ...

    def lock(self, wait: bool = False) -> contextlib.AbstractContextManager[bool]:
        """Hold the store's lock while open, and yield True.

        If another process holds it, yield False at once or, with ``wait``, wait until it is free.
        """
        ...

    def remove_abandoned(self, age_s: float) -> None:
        """Remove sibling stores that are unlocked and were last written over ``age_s`` ago."""
        ...


def open_checkpoint_store(uri: str) -> CheckpointStore:
    """The store at a folder's path, a file:// URI or an s3:// URI."""
    return _Folder(local_path(uri)) if is_local(uri) else _Bucket(uri)


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root, self.uri = root.resolve(), str(root.resolve())

    def staging(self, name: str, token: int) -> Path:
        folder = self.root / f".{name}.part-{token}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def upload(self, name: str, files: list[Path]) -> None:
        pass

    def publish(self, name: str, folder: Path, manifest: dict[str, Any]) -> None:
        write_manifest(folder / MANIFEST, FORMAT, VERSION, manifest)
        self.remove(name)
        folder.rename(self.root / name)

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob(f"step-*/{MANIFEST}"))

    def manifest(self, name: str) -> dict[str, Any]:
        return read_manifest(self.root / name / MANIFEST, FORMAT, VERSION)

    def on_disk(self, name: str) -> Path | None:
        return self.root / name

    def fetch(self, name: str, into: Path) -> None:
        shutil.copytree(self.root / name, into)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / name / MANIFEST).unlink()
            shutil.rmtree(self.root / name)

    def clear(self, keep: list[str]) -> None:
        for path in (*self.root.glob("step-*"), *self.root.glob(".step-*.part-*")):
            if path.name not in keep:
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[bool]:
        file = self._locked_file(0 if wait else fcntl.LOCK_NB)
        if file is None:
            yield False
            return
        try:
            yield True
        finally:
            (self.root / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it contains checkpoints or someone else's files
                self.root.rmdir()
            os.close(file)

    def _locked_file(self, flag: int) -> int | None:
        """The lock file, locked until it is closed, at the latest when the process ends."""
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the last holder just removed the folder
                file = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
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

    def remove_abandoned(self, age_s: float) -> None:
        for root in self.root.parent.iterdir():
            if root == self.root or not re.fullmatch(r"[0-9a-f]{16}", root.name):
                continue
            with contextlib.suppress(FileNotFoundError):  # another run may remove it, too
                written = max(path.stat().st_mtime for path in (root, *root.iterdir()))
                if time.time() - written > age_s:
                    other = _Folder(root)
                    with other.lock() as acquired:
                        if acquired:
                            other.clear([])


class _Bucket:
    def __init__(self, uri: str) -> None:
        from nudge.components.common.clients.storage import s3_client, split_s3_uri

        self.uri = uri
        self._bucket, self._prefix = split_s3_uri(uri)
        self._client = s3_client()

    def staging(self, name: str, token: int) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"nudge-{name}-"))

    def upload(self, name: str, files: list[Path]) -> None:
        for path in files:
            key = f"{self._prefix}/{name}/{path.name}"
            with self._errors(f"write the checkpoint {self.uri}/{name}"):
                self._client.upload_file(str(path), self._bucket, key)

    def publish(self, name: str, folder: Path, manifest: dict[str, Any]) -> None:
        write_manifest(folder / MANIFEST, FORMAT, VERSION, manifest)
        self.upload(name, [folder / MANIFEST])

    def names(self) -> list[str]:
        names = (key.split("/")[0] for key in self._keys() if key.endswith(f"/{MANIFEST}"))
        return sorted(name for name in names if name.startswith("step-"))

    def manifest(self, name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            self._download(name, Path(folder), [MANIFEST])
            return read_manifest(Path(folder) / MANIFEST, FORMAT, VERSION)

    def on_disk(self, name: str) -> Path | None:
        return None

    def fetch(self, name: str, into: Path) -> None:
        self._download(name, into, [MANIFEST, *self.manifest(name)["files"]])

    def remove(self, name: str) -> None:
        self._delete([key for key in self._keys() if key.startswith(f"{name}/")])

    def clear(self, keep: list[str]) -> None:
        self._delete([key for key in self._keys() if key.split("/")[0] not in keep])

    def lock(self, wait: bool = False) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)

    def remove_abandoned(self, age_s: float) -> None:
        pass  # a bucket's lifecycle rules can do this

    def _keys(self) -> list[str]:
        from nudge.components.common.clients.storage import list_keys

        with self._errors(f"list the checkpoints at {self.uri}"):
            keys = list_keys(self._client, self._bucket, self._prefix)
        return [key.removeprefix(f"{self._prefix}/") for key in keys]

    def _delete(self, keys: list[str]) -> None:
        with self._errors(f"remove old checkpoints at {self.uri}"):
            for key in sorted(keys, key=lambda key: not key.endswith(f"/{MANIFEST}")):
                self._client.delete_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}")

    def _download(self, name: str, into: Path, files: list[str]) -> None:
        into.mkdir(parents=True, exist_ok=True)
        with self._errors(f"read the checkpoint {self.uri}/{name}"):
            for file in files:
                key = f"{self._prefix}/{name}/{Path(file).name}"
                self._client.download_file(self._bucket, key, str(into / Path(file).name))

    def _errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        from nudge.components.common.clients.storage import s3_errors

        return s3_errors(doing)
