"""The folder through which a launcher and the pods of its job pass files to each other.

It is an ``s3://`` URI or a folder of a shared volume. A bundle is a folder of files beside
``<name>.json``, which lists their sizes and sha256 and is written last: a bundle is complete or
invisible.
"""

import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from nudge.components.common.clients.store import open_store
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import published, sha256_file, verify_file

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints, for recipes that name no other."""

JOB_FOLDER = re.compile(r"nudge-[a-z0-9-]+-[0-9a-f]{8}")


class Handover:
    """One job's folder; made from its URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._store = open_store(self.uri)

    def send(self, name: str, source: Path) -> None:
        """Copy a file or folder there as ``name``; do nothing if the same bundle is there."""
        root, files = (source, _files(source)) if source.is_dir() else (source.parent, [source])
        listing = {
            path.relative_to(root).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in files
        }
        manifest = {"file": source.is_file(), "files": listing}
        if self.read(name) == manifest:
            return
        self._store.delete([f"{name}.json"])
        self._store.remove(name)
        for file in listing:
            self._store.put(root / file, f"{name}/{file}")
        self._store.write(f"{name}.json", json.dumps(manifest).encode())

    def read(self, name: str) -> dict[str, Any] | None:
        """The listing of the bundle ``name``, or None if there is no complete one."""
        listing = self._store.read(f"{name}.json")
        return None if listing is None else dict(json.loads(listing))

    def fetch(self, name: str, target: Path) -> None:
        """Copy the bundle to ``target`` and verify it; `UserError` if it is missing or damaged."""
        manifest = self.read(name)
        if manifest is None:
            raise UserError(f"{self.uri} has no complete {name}")
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder) if self._store.folder is None else self._store.folder / name
            for file, listed in manifest["files"].items():
                if not (here / file).resolve().is_relative_to(here.resolve()):
                    raise UserError(f"{self.uri}/{name}.json lists {file}, which is not inside it")
                if self._store.folder is None:
                    self._store.get(f"{name}/{file}", here / file)
                verify_file(here / file, listed["sha256"])
            if manifest["file"]:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / next(iter(manifest["files"])), target)
                return
            with published(target) as part:
                for file in manifest["files"]:
                    (part / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(here / file, part / file)

    def clear(self, *, keep_checkpoints: bool = False) -> None:
        """Remove the folder, listings first, so that no bundle ever looks complete while it is not.

        With ``keep_checkpoints`` the checkpoints in it stay.
        """
        children = self._store.children()
        if not (keep_checkpoints and f"{CHECKPOINTS}/" in children):
            self._store.remove()
            return
        others = children - {f"{CHECKPOINTS}/"}
        self._store.delete(name for name in others if not name.endswith("/"))
        for name in others:
            if name.endswith("/"):
                self._store.remove(name)


def idle_folders(root: str, idle_s: float) -> list[str]:
    """Names of the jobs whose folders in ``root`` nothing has written to for ``idle_s`` seconds."""
    newest: dict[str, float] = {}
    for name, stored in open_store(root).list().items():
        job = name.partition("/")[0]
        newest[job] = max(newest.get(job, 0), stored.modified)
    limit = time.time() - idle_s
    return sorted(name for name, at in newest.items() if at < limit and JOB_FOLDER.fullmatch(name))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
