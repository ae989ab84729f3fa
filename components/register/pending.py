"""Registrations that a registry did not take, kept in the object store until it does.

``<uri>.registration.json`` (nudge.registration, version 1) stands next to the version's folder, or,
of an image, below ``registrations/`` in the data connection's bucket; so what finishes it needs
nothing of the run, which may be gone.
"""

import dataclasses
import io
import json
import os
import shlex
from typing import Any

from nudge.components.common.clients.registry.connection import registry_url
from nudge.components.common.clients.storage import (
    bucket_name,
    list_keys,
    s3_client,
    s3_errors,
    split_s3_uri,
)
from nudge.components.common.core.environment import EMBEDDED as EMBEDDED_PARTS
from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.register.register import Registration, enter

FORMAT, VERSION = "nudge.registration", 1
ENDING = ".registration.json"
EMBEDDED, AWS = "embedded", "aws"
"""Names of a store or registry on the command line: this machine's own, and Amazon's."""


def keep(entry: Registration, url: str) -> str:
    """Write a registration down; returns the command that finishes it with the registry ``url``.

    The command names the registry and the store, so it means the same in any shell.
    """
    bucket, key = _place(entry.uri)
    own = _is_embedded("model-registry") and url == registry_url()
    registry = EMBEDDED if own else url
    body = {
        "format": FORMAT,
        "version": VERSION,
        "registry": registry,
        "registration": dataclasses.asdict(entry),
    }
    with s3_errors(f"keep the registration of {entry.uri}"):
        s3_client().put_object(
            Bucket=bucket,
            Key=key,
            Body=json.dumps(body, indent=2, sort_keys=True).encode(),
        )
    store = os.environ.get("AWS_S3_ENDPOINT") or AWS
    store = EMBEDDED if _is_embedded("object-store") else store
    command = ["nudge", "register", entry.uri, "--registry-url", registry, "--store", store]
    if entry.uri.startswith("oci:") and store != EMBEDDED:
        command += ["--bucket", bucket]
    if EMBEDDED in (registry, store):
        command += ["--home", str(nudge_home())]
    return shlex.join(command)


def finish(uri: str, *, any_registry: bool = False) -> dict[str, Any]:
    """Register what was kept for the version at ``uri``; returns what `register` does.

    Unless ``any_registry``, the registry must be the one that the run meant. Raises `UserError` if
    it is another, if nothing was kept, if the version is not complete, or as `register`.
    """
    if not _complete(uri):
        raise UserError(f"{uri} holds no complete version; `nudge models` lists those there are")
    bucket, key = _place(uri)
    client = s3_client()
    with s3_errors(f"read the registration of {uri}"):
        kept = io.BytesIO()
        listed = client.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", [])
        if not any(each["Key"] == key for each in listed):
            raise UserError(
                f"there is no registration to finish for {uri}; `nudge models` shows whether it "
                "is registered"
            )
        client.download_fileobj(bucket, key, kept)
    values = json.loads(kept.getvalue())
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{uri}{ENDING} is no {FORMAT} of version {VERSION}")
    url = registry_url()
    here = EMBEDDED if _is_embedded("model-registry") else url
    meant = values.get("registry", here)  # older releases did not write it
    if meant != here and not any_registry:
        raise UserError(
            f"the run meant to register {uri} in the registry {meant}, and this would use {here}; "
            f"give --registry-url {meant} (or --registry-url {here}, to register it there)"
        )
    told = enter(url, Registration(**values["registration"]))
    forget(uri)
    return told


def forget(uri: str) -> None:
    """Take away what was kept for a version that is registered now; nothing kept is fine."""
    bucket, key = _place(uri)
    with s3_errors(f"forget the registration of {uri}"):
        s3_client().delete_object(Bucket=bucket, Key=key)


def _is_embedded(part: str) -> bool:
    """Whether a part is one that nudge started below NUDGE_HOME."""
    return part in os.environ.get(EMBEDDED_PARTS, "").split(",")


def _place(uri: str) -> tuple[str, str]:
    """Bucket and key of what is kept for a version."""
    if not uri.startswith("oci:"):
        bucket, key = split_s3_uri(uri)
        return bucket, key + ENDING
    bucket = bucket_name()
    if not bucket:
        raise UserError("AWS_S3_BUCKET is not set: it names where registrations are kept")
    return bucket, f"registrations/{uri.removeprefix('oci://')}{ENDING}"


def _complete(uri: str) -> bool:
    if uri.startswith("oci:"):
        from nudge.components.common.clients.modelcar import exists

        return exists(uri)
    bucket, key = split_s3_uri(uri)
    with s3_errors(f"look for {uri}"):
        return f"{key}/manifest.json" in list_keys(s3_client(), bucket, key)
