"""The files of a model folder, and whether they are those that its upload's manifest lists.

Only the standard library, and nothing of nudge: a server on a cluster runs this file by itself
(``python3 -I -c SOURCE FOLDER JSON``, JSON being the arguments of `check` after the folder).
"""

import fnmatch
import hashlib
import json
import os
import sys
from pathlib import Path, PurePosixPath

MANIFEST = "manifest.json"
FORMAT, VERSION = "nudge.upload", 1


class Tampered(ValueError):
    """A folder holds something other than what was uploaded; the text says what."""


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model by relative name, sorted: all but hidden ones and an upload's manifest.

    These are what an upload sends, so an evaluation's digest is of these as well.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.as_posix() != MANIFEST:
            files[name.as_posix()] = path
    return files


def files_sha256(sha256: dict[str, str]) -> str:
    """Hex sha256 over the files' names and their sha256, by name in order."""
    digest = hashlib.sha256()
    for name in sorted(sha256):
        digest.update(f"{name}\0{sha256[name]}\n".encode())
    return digest.hexdigest()


def weights_sha256(sha256: dict[str, str]) -> str:
    """The same over the safetensors files at the top of the folder only."""
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
) -> dict[str, dict[str, object]]:
    """The entries of a manifest by file name; an empty argument is not compared.

    ``no_digest`` is for those who do not come from the registry with an expected digest.

    Raises `Tampered` if the manifest is not the registered one, names another model or version, or
    lists other weights, and if the registry has no digest of a manifest that names its version.
    """
    actual = hashlib.sha256(body).hexdigest()
    if manifest_sha256 not in ("", actual):
        raise Tampered(
            f"{MANIFEST} has the sha256 {actual}, and the registry says {manifest_sha256}: it is "
            "not the one that was registered"
        )
    try:
        manifest = json.loads(body)
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise Tampered(f"{MANIFEST} is not a {FORMAT} of version {VERSION}")
        files = {str(name): dict(entry) for name, entry in manifest["files"].items()}
        sha256 = {name: str(entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, Tampered):
            raise
        raise Tampered(f"{MANIFEST} cannot be read: {error}") from None
    named = manifest.get("model", ""), manifest.get("model_version", "")
    for what, is_of, expected in zip(("model", "version"), named, (model, version), strict=True):
        if is_of and expected and is_of != expected:
            raise Tampered(f"{MANIFEST} is of {what} {is_of!r}, not of {expected!r}")
    if any(named) and version and not (manifest_sha256 or no_digest):
        raise Tampered(
            f"the registry has no manifest_sha256 of this version, and its upload has a {MANIFEST} "
            "that names it: somebody took the digest out of the registry"
        )
    if weights and weights_sha256(sha256) != weights:
        raise Tampered(
            f"{MANIFEST} lists weights with the sha256 {weights_sha256(sha256)}, and the registry "
            f"says {weights}"
        )
    return files


def check(
    folder: Path,
    manifest_sha256: str = "",
    model: str = "",
    version: str = "",
    weights: str = "",
    empty_missing: bool = False,
) -> None:
    """Compare each file of ``folder`` with its manifest, and the manifest as `check_manifest` does.

    Raises `Tampered` if a file is missing, differs, is a link or is not listed, or if an index of
    weights names a file that is not listed. With ``empty_missing`` a listed file of 0 bytes may be
    missing: KServe's storage-initializer skips empty objects.
    """
    root = folder.resolve()
    there = _walk(root)
    if MANIFEST not in there:
        raise Tampered(f"there is no {MANIFEST}: the upload is not complete")
    body = (root / MANIFEST).read_bytes()
    files = check_manifest(body, manifest_sha256, model, version, weights)
    for name in files:
        if not _inside(name):
            raise Tampered(f"{MANIFEST} names {name}, which leads out of the folder")
    if unlisted := sorted(there - files.keys() - {MANIFEST}):
        raise Tampered(f"{', '.join(unlisted[:5])}: not in {MANIFEST}, so never evaluated")
    for name, entry in files.items():
        if name not in there:
            if empty_missing and entry.get("bytes") == 0:
                continue
            raise Tampered(f"{name} is missing, which {MANIFEST} lists")
        with (root / name).open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != entry["sha256"]:
            raise Tampered(
                f"{name} has the sha256 {actual}, {MANIFEST} says {entry['sha256']}: it was "
                "changed since it was uploaded"
            )
    for name in there:
        if name.endswith(".index.json"):
            _check_index(root / name, PurePosixPath(name).parent, set(files))


def _walk(root: Path) -> set[str]:
    """The names of all files below a folder, hidden ones too; raises `Tampered` on links."""
    there = set()
    for parent, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise Tampered(f"{path.relative_to(root)} is neither a file nor a folder")
        there |= {Path(parent, name).relative_to(root).as_posix() for name in names}
    return there


def _check_index(path: Path, folder: PurePosixPath, listed: set[str]) -> None:
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise Tampered(f"{path.name} cannot be read: {error}") from None
    weights = index.get("weight_map") if isinstance(index, dict) else None
    for shard in sorted(set(map(str, (weights or {}).values()))):
        name = (folder / shard).as_posix()
        if not _inside(name) or name not in listed:
            raise Tampered(f"{path.name} names the shard {shard}, which {MANIFEST} does not list")


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def main() -> None:
    """Check the folder of the command line; on failure say why in the server's log as well.

    A failing postStart hook's own output reaches nobody: Kubernetes leaves it out of the event.
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
