"""The upload artifact: a model folder whose ``manifest.json`` lists every file with its sha256.

``manifest.json`` (nudge.upload, version 1) also names the model and its version.

This file uses only the standard library and no other module of nudge, because a server on a cluster
runs it by itself (``python3 -I -c SOURCE FOLDER JSON``; JSON has the arguments of `check` after the
folder).
"""

import fnmatch
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MANIFEST = "manifest.json"
FORMAT, VERSION = "nudge.upload", 1


class Tampered(ValueError):
    """A folder differs from what was uploaded; the text says how."""


@dataclass(frozen=True)
class UploadedFile:
    """A file of an upload; ``bytes`` is None if the manifest does not say."""

    sha256: str
    bytes: int | None = None


@dataclass(frozen=True)
class Upload:
    """The manifest of an upload; ``model`` and ``model_version`` are empty in older manifests."""

    files: dict[str, UploadedFile]
    model: str = ""
    model_version: str = ""

    @property
    def sha256(self) -> dict[str, str]:
        """The sha256 of each file."""
        return {name: file.sha256 for name, file in self.files.items()}

    def to_json(self) -> bytes:
        """The bytes of ``manifest.json``, always the same for the same upload."""
        files = {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in self.files.items()}
        manifest: dict[str, object] = {"format": FORMAT, "version": VERSION, "files": files}
        if self.model:
            manifest |= {"model": self.model, "model_version": self.model_version}
        return json.dumps(manifest, indent=2, sort_keys=True).encode()


def read_upload(body: bytes) -> Upload:
    """Parse a manifest; unknown keys are ignored. Raises `Tampered` if it is not a manifest."""
    try:
        manifest = json.loads(body)
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise Tampered(f"{MANIFEST} is not in the format {FORMAT}, version {VERSION}")
        files = {
            str(name): UploadedFile(str(entry["sha256"]), entry.get("bytes"))
            for name, entry in manifest["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, Tampered):
            raise
        raise Tampered(f"{MANIFEST} cannot be read: {error}") from None
    return Upload(files, manifest.get("model", ""), manifest.get("model_version", ""))


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model by relative name, sorted, without hidden files and the manifest.

    These are the files that an upload sends, so an evaluation's digest covers them too.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.as_posix() != MANIFEST:
            files[name.as_posix()] = path
    return files


def files_sha256(sha256: dict[str, str]) -> str:
    """Hex sha256 over the names and sha256 of the files, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(sha256):
        digest.update(f"{name}\0{sha256[name]}\n".encode())
    return digest.hexdigest()


def weights_sha256(sha256: dict[str, str]) -> str:
    """The `files_sha256` of only the safetensors files at the top of the folder."""
    weights = {
        name: each
        for name, each in sha256.items()
        if fnmatch.fnmatch(name, "*.safetensors") and "/" not in name
    }
    return files_sha256(weights)


def check_manifest(
    body: bytes,
    manifest_sha256: str = "",
    model: str = "",
    version: str = "",
    weights: str = "",
    no_digest: bool = False,
) -> Upload:
    """Parse a manifest and compare it with the arguments that are not empty.

    ``no_digest`` is for callers that have no digest from the registry.

    Raises `Tampered` if the manifest is not the registered one, names another model or version, or
    lists other weights, or if the registry has no digest although the manifest names its version.
    """
    actual = hashlib.sha256(body).hexdigest()
    if manifest_sha256 not in ("", actual):
        raise Tampered(
            f"{MANIFEST} has the sha256 {actual}, but the registry says {manifest_sha256}: it is "
            "not the one that was registered"
        )
    upload = read_upload(body)
    for what, actual, expected in (
        ("model", upload.model, model),
        ("version", upload.model_version, version),
    ):
        if actual and expected and actual != expected:
            raise Tampered(f"{MANIFEST} is of {what} {actual!r}, not of {expected!r}")
    if (upload.model or upload.model_version) and version and not (manifest_sha256 or no_digest):
        raise Tampered(
            f"the registry has no manifest_sha256 of this version, but its upload has a {MANIFEST} "
            "that names it: somebody removed the digest from the registry"
        )
    if weights and weights_sha256(upload.sha256) != weights:
        raise Tampered(
            f"{MANIFEST} lists weights with the sha256 {weights_sha256(upload.sha256)}, but the "
            f"registry says {weights}"
        )
    return upload


def check(
    folder: Path,
    manifest_sha256: str = "",
    model: str = "",
    version: str = "",
    weights: str = "",
    empty_missing: bool = False,
) -> None:
    """Compare each file of ``folder`` with its manifest, and check that with `check_manifest`.

    Raises `Tampered` if a file is missing, differs, is a link or is not listed, or if an index of
    weights names a file that is not listed. With ``empty_missing`` a listed file of 0 bytes may be
    missing, because KServe's storage-initializer skips empty objects.
    """
    root = folder.resolve()
    present = _walk(root)
    if MANIFEST not in present:
        raise Tampered(f"there is no {MANIFEST}: the upload is not complete")
    body = (root / MANIFEST).read_bytes()
    files = check_manifest(body, manifest_sha256, model, version, weights).files
    for name in files:
        if not _inside(name):
            raise Tampered(f"{MANIFEST} names {name}, which is outside the folder")
    if unlisted := sorted(present - files.keys() - {MANIFEST}):
        raise Tampered(f"{', '.join(unlisted[:5])}: not in {MANIFEST}, so never evaluated")
    for name, entry in files.items():
        if name not in present:
            if empty_missing and entry.bytes == 0:
                continue
            raise Tampered(f"{name} is missing, but {MANIFEST} lists it")
        _check_file(root / name, name, entry.sha256)
    for name in present:
        if name.endswith(".index.json"):
            _check_index(root / name, PurePosixPath(name).parent, set(files))


def check_present(folder: Path, manifest_sha256: str = "") -> None:
    """Compare the files of an incomplete download with its manifest, as `check` does.

    Raises `Tampered` if a file differs or is not listed; files may be missing, except the manifest.
    """
    root = folder.resolve()
    present = _walk(root)
    if MANIFEST not in present:
        raise Tampered(f"there is no {MANIFEST}: the upload is not complete")
    body = (root / MANIFEST).read_bytes()
    files = check_manifest(body, manifest_sha256, no_digest=True).files
    for name in sorted(present - {MANIFEST}):
        if name not in files:
            raise Tampered(f"{name}: not in {MANIFEST}, so never evaluated")
        _check_file(root / name, name, files[name].sha256)


def _check_file(path: Path, name: str, sha256: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise Tampered(
            f"{name} has the sha256 {actual}, but {MANIFEST} says {sha256}: it was changed after "
            "the upload"
        )


def _walk(root: Path) -> set[str]:
    """The names of all files below a folder, hidden ones too; raises `Tampered` on links."""
    found = set()
    for parent, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise Tampered(f"{path.relative_to(root)} is neither a file nor a folder")
        found |= {Path(parent, name).relative_to(root).as_posix() for name in names}
    return found


def _check_index(path: Path, folder: PurePosixPath, listed: set[str]) -> None:
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise Tampered(f"{path.name} cannot be read: {error}") from None
    weights = index.get("weight_map") if isinstance(index, dict) else None
    for shard in sorted(set(map(str, (weights or {}).values()))):
        name = (folder / shard).as_posix()
        if not _inside(name) or name not in listed:
            raise Tampered(f"{path.name} names the shard {shard}, but {MANIFEST} does not list it")


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def main() -> None:
    """Check the folder from the command line; write a failure to the server's log too.

    Kubernetes does not show the output of a failing postStart hook, not even in its event.
    """
    try:
        check(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    except (Tampered, OSError) as error:
        text = f"nudge: the model is not the one that was evaluated: {error}\n"
        for path in ("/proc/1/fd/2", "/dev/termination-log"):
            try:
                with open(path, "a") as log:
                    log.write(text)
            except OSError:
                continue
        sys.exit(text)


if __name__ == "__main__":
    main()
