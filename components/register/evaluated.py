"""The digest of an upload's manifest, which is registered only if the upload was evaluated."""

import tempfile
from pathlib import Path

from nudge.components.common.artifacts import model_files
from nudge.components.common.artifacts.evaluation import EvaluatedModel
from nudge.components.common.core.errors import UserError


def evaluated_manifest(uri: str, model_name: str, version: str, candidate: EvaluatedModel) -> str:
    """Hex sha256 of the manifest of the upload at ``uri``.

    Raises `UserError` unless the manifest is of this version and lists exactly the files of the
    evaluated ``candidate``. An evaluation by an older release only has a digest of the weights.
    """
    from nudge.components.common.core.publish import sha256_file
    from nudge.components.common.models.registered import download_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model_files.MANIFEST
        download_model(uri, path.parent, (f"*{model_files.MANIFEST}",))
        if not path.is_file():
            raise UserError(f"{uri} is not complete: it has no {path.name}; upload the model again")
        try:
            upload = model_files.check_manifest(
                path.read_bytes(), "", model_name, version, no_digest=True
            )
        except model_files.Tampered as error:
            raise UserError(f"{uri}: {error}") from None
        digest = sha256_file(path)
    for what, evaluated, actual in (
        ("files", candidate.files_sha256, model_files.files_sha256(upload.sha256)),
        ("weights", candidate.sha256, model_files.weights_sha256(upload.sha256)),
    ):
        if evaluated not in (None, actual):
            raise UserError(
                f"the evaluation is of {what} with the sha256 {evaluated}, but {uri} has {actual}: "
                "another model was uploaded; evaluate this one"
            )
    return digest
