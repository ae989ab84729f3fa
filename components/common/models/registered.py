"""Uploaded models that a run reads: their files must be the ones that were registered.

The registry has the digest of the manifest of a version's upload. A *pinned* URI carries it along,
as ``s3://bucket/models/m/v1#manifest_sha256=...``, so that whoever downloads from it later, on
another node too, can compare it without asking the registry.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts import model_files
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file
from nudge.components.common.core.uris import scheme_of
from nudge.components.common.models.own_copies import link_own_files

PIN = "#manifest_sha256="
CHECKED = ("s3", "oci")
"""The schemes of uploads, which have a manifest to compare."""


def expected(version: Version) -> dict[str, Any]:
    """What the registry says about a version's files: arguments of `model_files.check`."""
    return {
        "manifest_sha256": str(version.properties.get("manifest_sha256", "")),
        "model": version.model,
        "version": version.name,
        "weights": str(version.properties.get("model_sha256", "")),
    }


def split_pin(uri: str) -> tuple[str, str]:
    """A URI without its pin, and the digest in the pin; empty if the URI has none."""
    plain, _, digest = uri.partition(PIN)
    return plain, digest


def pinned_uri(version: Version) -> str:
    """The URI of a version, pinned to the manifest of its upload.

    Raises `UserError` unless the manifest there is the registered one and names this version, or if
    the URI is not one of an upload: nothing there can be compared with what was registered.
    """
    title = f"{version.model} {version.name}"
    if scheme_of(version.uri) not in CHECKED:
        raise UserError(
            f"{title} is registered as {version.uri}, and nothing there can be compared with what "
            "was evaluated; name that URI itself as the base model if you trust it"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model_files.MANIFEST
        download_model(version.uri, path.parent, (f"*{model_files.MANIFEST}",))
        if not path.is_file():
            raise UserError(
                f"{title}: {version.uri} has no {model_files.MANIFEST}; upload it again"
            )
        try:
            model_files.check_manifest(path.read_bytes(), **expected(version))
        except model_files.Tampered as error:
            raise UserError(f"{version.uri} is not what was registered: {error}") from None
        # Of a version without a digest in the registry, this binds what is read from now on.
        return f"{version.uri}{PIN}{sha256_file(path)}"


def download_model(
    uri: str, folder: Path, files: tuple[str, ...] = ("*",), own: bool = True
) -> None:
    """Download the files of an uploaded model whose names match one of the patterns ``files``, from
    an object store (``s3://``) or an image (``oci://``). With ``own``, files that a run of this
    machine wrote are hard links to the run's, so they take no space.

    Raises `UserError` if there are none.
    """
    if scheme_of(uri) == "oci":
        from nudge.components.common.clients.modelcar import download_image

        download_image(uri, folder, files)
        return
    from nudge.components.common.clients.bucket import download_folder

    if own:
        download_folder(uri, folder, files, functools.partial(link_own_files, uri, folder))
    else:
        download_folder(uri, folder, files)


def check_download(folder: Path, uri: str, digest: str = "", partial: bool = False) -> None:
    """Compare a downloaded folder with the manifest in it, and that with the ``digest`` of a pin.

    Without a digest, a folder that has no manifest is not of an upload and passes. ``partial``: not
    every file was downloaded. Raises `UserError` if a file is missing, differs or is not listed, or
    if the manifest or an index of weights names a file outside the folder.
    """
    if not digest and not (folder / model_files.MANIFEST).is_file():
        return
    check = model_files.check_present if partial else model_files.check
    try:
        check(folder, digest)
    except model_files.Tampered as error:
        raise UserError(f"{uri}: {error}") from None
