"""Pending registrations: kept in the object store while the registry does not answer.

``<uri>.registration.json`` (nudge.registration, version 1) is next to the version's folder; for an
image it is below ``registrations/`` in the data connection's bucket. Finishing a registration needs
nothing else from the run, which may be gone.

Whoever can write to the bucket can change this file too. So the command that the run prints has the
file's sha256, and another file is refused.
"""

import dataclasses
import hashlib
import json
import os
import shlex
from typing import Any

from nudge.components.common.clients.registry.connection import registry_url
from nudge.components.common.clients.storage import bucket_name, split_s3_uri
from nudge.components.common.clients.store import open_store
from nudge.components.common.core.environment import EMBEDDED as EMBEDDED_PARTS
from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.store import MANIFEST
from nudge.components.register.entry import Registration, enter

FORMAT, VERSION = "nudge.registration", 1
ENDING = ".registration.json"
EMBEDDED, AWS = "embedded", "aws"
"""Names of a store or registry on the command line: nudge's own on this machine, and Amazon's."""


def keep(entry: Registration, url: str) -> str:
    """Save a registration; returns the command that finishes it with the registry ``url``.

    The command names the registry and the store, so it works in any shell, and it has the sha256 of
    what was saved.
    """
    bucket, key = _location(entry.uri)
    own = _is_embedded("model-registry") and url == registry_url()
    registry = EMBEDDED if own else url
    body = {
        "format": FORMAT,
        "version": VERSION,
        "registry": registry,
        "registration": dataclasses.asdict(entry),
    }
    saved = json.dumps(body, indent=2, sort_keys=True).encode()
    open_store(f"s3://{bucket}").write(key, saved)
    store = os.environ.get("AWS_S3_ENDPOINT") or AWS
    store = EMBEDDED if _is_embedded("object-store") else store
    command = ["nudge", "register", entry.uri, "--registry-url", registry, "--store", store]
    if entry.uri.startswith("oci:") and store != EMBEDDED:
        command += ["--bucket", bucket]
    if EMBEDDED in (registry, store):
        command += ["--home", str(nudge_home())]
    return shlex.join([*command, "--sha256", hashlib.sha256(saved).hexdigest()])


def finish(uri: str, sha256: str, *, any_registry: bool = False) -> dict[str, Any]:
    """Finish the pending registration of the version at ``uri``; returns the result of `enter`.

    ``sha256`` is that of the pending registration, which the run printed. Unless ``any_registry``,
    the registry must be the one that the run used. Raises `UserError` if either is another one, if
    no registration is pending, if the version is incomplete, or as `register`.
    """
    if not _complete(uri):
        raise UserError(f"{uri} is not a complete version; `nudge models` lists the versions")
    bucket, key = _location(uri)
    saved = open_store(f"s3://{bucket}").read(key)
    if saved is None:
        raise UserError(
            f"no registration is pending for {uri}; `nudge models` shows whether it is registered"
        )
    _check_unchanged(uri, saved, sha256)
    values = json.loads(saved)
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{uri}{ENDING} is not in the format {FORMAT}, version {VERSION}")
    url = registry_url()
    here = EMBEDDED if _is_embedded("model-registry") else url
    intended = values.get("registry", here)  # older releases did not record it
    if intended != here and not any_registry:
        raise UserError(
            f"the run used the registry {intended} for {uri}, but this command would use {here}; "
            f"pass --registry-url {intended} (or --registry-url {here}, to register it there)"
        )
    entry = Registration(**values["registration"])
    if entry.uri != uri:
        raise UserError(f"the pending registration of {uri} is of another upload, {entry.uri}")
    registered = enter(url, entry)
    forget(uri)
    return registered


def _check_unchanged(uri: str, saved: bytes, sha256: str) -> None:
    """Raise `UserError` unless a saved registration is the one that the run printed."""
    actual = hashlib.sha256(saved).hexdigest()
    if not sha256:
        raise UserError(
            "--sha256 is missing: whoever can write to the bucket could have changed the pending "
            f"registration of {uri}. The run's error has the complete command; the command of an "
            "older release has no --sha256. If you trust everybody who can write to the bucket, "
            f"pass --sha256 {actual}"
        )
    if sha256 != actual:
        raise UserError(
            f"the pending registration of {uri} has the sha256 {actual}, but the run saved one "
            f"with {sha256}: it was changed since; look at {uri}{ENDING}, or train again"
        )


def forget(uri: str) -> None:
    """Delete the pending registration of a registered version, if there is one."""
    bucket, key = _location(uri)
    open_store(f"s3://{bucket}").delete([key])


def _is_embedded(part: str) -> bool:
    """Whether nudge itself runs this service, below NUDGE_HOME."""
    return part in os.environ.get(EMBEDDED_PARTS, "").split(",")


def _location(uri: str) -> tuple[str, str]:
    """Bucket and key of a version's pending registration."""
    if not uri.startswith("oci:"):
        bucket, key = split_s3_uri(uri)
        return bucket, key + ENDING
    bucket = bucket_name()
    if not bucket:
        raise UserError("AWS_S3_BUCKET is not set: it names the bucket of pending registrations")
    return bucket, f"registrations/{uri.removeprefix('oci://')}{ENDING}"


def _complete(uri: str) -> bool:
    if uri.startswith("oci:"):
        from nudge.components.common.clients.modelcar import exists

        return exists(uri)
    return open_store(uri).read(MANIFEST) is not None
