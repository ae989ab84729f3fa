"""Artifacts on disk: complete or invisible, and verified by their sha256."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.core.environment import in_pod
from nudge.components.common.core.errors import UserError


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that becomes ``target`` if the block succeeds.

    After an exception, a full disk or a kill, nothing new is at ``target``; earlier content is
    replaced only by a complete successor. Only in a pod can the group write to it, because the
    steps of a pipeline may have different user ids and share group 0 (as on OpenShift); elsewhere
    the umask decides who can read it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.part-{secrets.token_hex(8)}"
    part.mkdir(mode=0o755)
    if in_pod():
        part.chmod(0o775)
    try:
        yield part
        for path in part.rglob("*"):
            if path.is_file():
                fsync(path)
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8, so that ``path`` has either all of it or its old content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_manifest(path: Path, format: str, version: int, body: dict[str, Any]) -> None:
    """Write a manifest as sorted JSON that begins with its format's name and version."""
    manifest = {"format": format, "version": version, **body}
    write_atomic(path, json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_manifest(path: Path, format: str, version: int) -> dict[str, Any]:
    """Read a manifest; raises `UserError` unless it has this format and version."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} is not a {format} artifact: it has no {path.name}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    found = (manifest.get("format"), manifest.get("version"))
    if found != (format, version):
        raise UserError(
            f"{path} is {found[0]} version {found[1]}, expected {format} version {version}"
        )
    return dict(manifest)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: Path) -> str:
    """Hex sha256 of the sorted relative paths and contents of all files in ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def verify_file(path: Path, sha256: str) -> None:
    """Raise `UserError` unless the file exists and has this sha256."""
    if not path.is_file():
        raise UserError(f"{path} is missing; create the artifact again")
    actual = sha256_file(path)
    if actual != sha256:
        raise UserError(f"{path} is damaged: sha256 {actual}, but its manifest says {sha256}")


def fsync(path: Path) -> None:
    """Wait until the disk has a file or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
