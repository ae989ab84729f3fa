"""Deletes the files of archived versions."""

from urllib.parse import urlsplit

from nudge.components.common.artifacts.model_files import MANIFEST, Tampered, check_manifest
from nudge.components.common.clients.store import open_store


def delete_version(uri: str, model: str, version: str) -> bool:
    """Delete an uploaded version: first its manifest, which makes it invisible, then its files.

    Deletes only the files that the manifest lists. Returns False, and deletes nothing, unless the
    URI ends in ``/<model>/<version>`` and its folder has this version's own manifest.
    """
    if urlsplit(uri).scheme != "s3" or not model or not version:
        return False
    if not uri.rstrip("/").endswith(f"/{model}/{version}"):
        return False
    store = open_store(uri)
    manifest = store.read(MANIFEST)
    if manifest is None:
        return False
    try:
        files = check_manifest(manifest, "", model, version, no_digest=True).files
    except Tampered:
        return False
    store.delete([MANIFEST, *files])
    return True
