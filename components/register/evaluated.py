"""The digest of an upload's manifest, registered only if the upload is what was evaluated."""

import tempfile
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts import model_files
from nudge.components.common.core.errors import UserError


def evaluated_manifest(uri: str, model_name: str, version: str, results: dict[str, Any]) -> str:
    """Hex sha256 of the manifest of the upload at ``uri``.

    Raises `UserError` unless the manifest is of this version and lists exactly the files that the
    evaluation ``results`` scored. An evaluation by an older nudge has a digest of the weights only.
    """
    from nudge.components.common.core.publish import sha256_file
    from nudge.components.common.models.base_model import download_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model_files.MANIFEST
        download_model(uri, path.parent, (f"*{model_files.MANIFEST}",))
        if not path.is_file():
            raise UserError(f"{uri} is not complete: it has no {path.name}; upload it again")
        try:
            files = model_files.check_manifest(
                path.read_bytes(), "", model_name, version, no_digest=True
            )
        except model_files.Tampered as error:
            raise UserError(f"{uri}: {error}") from None
        digest = sha256_file(path)
    sha256 = {name: str(entry["sha256"]) for name, entry in files.items()}
    candidate = results["models"]["candidate"]
    uploaded = {
        "files_sha256": model_files.files_sha256(sha256),
        "sha256": model_files.weights_sha256(sha256),
    }
    for key, actual in uploaded.items():
        if candidate.get(key, actual) != actual:
            what = "files" if key == "files_sha256" else "weights"
            raise UserError(
                f"the evaluation is of {what} with the sha256 {candidate[key]}, and {uri} has "
                f"{actual}: another model was uploaded; evaluate this one"
            )
    return digest
