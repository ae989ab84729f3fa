"""What is served is what was evaluated: names, URIs and files are compared with the registry.

The registry has the digest of the manifest of a version's upload (``manifest_sha256``), and the
manifest the digest of every file, with the model's and the version's name. So a writer of the
bucket cannot change a file, and a writer of the registry can only name an upload of this very
version. A version that was registered before there was such a digest is checked against its own
manifest and the sha256 of its weights in the registry (``model_sha256``), if it has one: its
tokenizer and configuration are then as trustworthy as the bucket.
"""

import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts import model_files
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.names import check_name
from nudge.components.common.models.registered import expected
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.signed import check_signature

FOLDER = "/mnt/models"
"""Where KServe puts a model in the server's container."""


def check_version(version: Version, settings: DeploySettings) -> None:
    """Raise `UserError` unless a version's names are sound, its URI is where its uploads are, and
    the keys that are set signed it."""
    check_name("the model", version.model)
    check_name("the version", version.name)
    check_signature(version, settings)
    title, uri = f"{version.model} {version.name}", version.uri
    scheme = uri.partition("://")[0]
    if scheme == "s3":
        _check_s3(title, version, settings)
    elif scheme == "oci":
        from nudge.components.common.clients.image_reference import parse_reference

        image = parse_reference(uri)
        if not image.digest:
            raise UserError(
                f"{title} is registered as {uri}, whose content can change; register it as "
                f"{image.registry}/{image.repository}@sha256:..."
            )
        if not settings.uploads.startswith("oci://"):
            raise UserError(
                f"{title} is registered as {uri}, and it is not known where its uploads are: give "
                "the recipe whose upload.target it was, or set deploy.uploads to that target"
            )
        start = f"{settings.uploads.rstrip('/')}/{version.model}@"
        if not uri.startswith(start):
            raise UserError(
                f"{title} is registered as {uri}, which is no upload of {version.model}: expected "
                f"{start}sha256:..."
            )
    elif scheme in ("hf", "pvc") and scheme not in settings.unverified:
        raise UserError(
            f"{title} is registered as {uri}, and nothing there can be compared with what was "
            f"evaluated; to serve it nevertheless, set deploy.unverified: [{scheme}]"
        )


def _check_s3(title: str, version: Version, settings: DeploySettings) -> None:
    bucket = os.environ.get("AWS_S3_BUCKET", "")
    targets = [settings.uploads] if settings.uploads.startswith("s3://") else []
    targets += [f"s3://{bucket}/models"] if bucket else []
    if not targets:
        raise UserError(
            f"it is not known where uploads of {version.model} are, so {version.uri} from the "
            "registry is not trusted: set AWS_S3_BUCKET, or deploy.uploads to the upload's target"
        )
    places = [f"{target.rstrip('/')}/{version.model}/{version.name}" for target in targets]
    if version.uri.rstrip("/") not in places:
        raise UserError(
            f"{title} is registered as {version.uri}, which is not where its upload is: expected "
            f"{' or '.join(places)}; if it was uploaded elsewhere, set deploy.uploads to that "
            "upload.target"
        )


def check_folder(folder: Path, version: Version) -> None:
    """Raise `UserError` unless a folder holds exactly what was evaluated and registered."""
    try:
        model_files.check(folder, **expected(version))
    except model_files.Tampered as error:
        raise UserError(f"{version.uri} is not what was evaluated: {error}") from None


def check_image(version: Version) -> None:
    """Raise `UserError` unless an image's manifest of files is the registered one.

    The image's digest binds the content, but only the manifest inside says of which version it is.
    """
    from nudge.components.common.models.registered import download_model

    with tempfile.TemporaryDirectory() as folder:
        download_model(version.uri, Path(folder), (model_files.MANIFEST,))
        path = Path(folder) / model_files.MANIFEST
        if not path.is_file():
            raise UserError(f"{version.uri} has no {model_files.MANIFEST}; upload it again")
        try:
            model_files.check_manifest(path.read_bytes(), **expected(version))
        except model_files.Tampered as error:
            raise UserError(f"{version.uri} is not what was evaluated: {error}") from None


def hook(version: Version) -> dict[str, Any]:
    """A ``lifecycle`` for the server's container that ends it unless the files are the right ones.

    An init container cannot check them: KServe appends its storage-initializer after those of the
    InferenceService (CommonStorageInitialization in pkg/webhook/admission/pod). A container becomes
    ready, and gets requests, only when its postStart hook has succeeded
    (https://kubernetes.io/docs/concepts/containers/container-lifecycle-hooks/). The server's image
    has python3, as every image of vLLM does.
    """
    arguments = json.dumps({**expected(version), "empty_missing": True}, sort_keys=True)
    source = inspect.getsource(model_files)
    return {"postStart": {"exec": {"command": ["python3", "-I", "-c", source, FOLDER, arguments]}}}
