"""The step `fetch`: a model that was trained before becomes an artifact of this run."""

import shutil
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.core.publish import published
from nudge.components.common.core.step import step


@step("fetch", outputs=("model", "history"), reuse=False)
def fetch(model_uri: str, *, model: Path, history: Path) -> dict[str, Any]:
    """Copy the model at a URI into ``model``; ``history`` becomes empty.

    The URI may have any form that a base model's URI may have. A folder with the manifest of an
    upload is checked against it, and the served version against the registry. Raises `UserError` if
    the model is damaged or was not trained by nudge.
    """
    from nudge.components.common.models.base_model import local_model, resolved
    from nudge.components.common.models.registered import check_download, split_pin

    uri = resolved(model_uri)
    folder = local_model(uri)
    read_model_facts(folder)
    plain, digest = split_pin(uri)
    check_download(folder, plain, digest)
    with published(model) as part:
        shutil.copytree(folder, part, dirs_exist_ok=True)
    with published(history) as part:
        for name in ("metrics.jsonl", "probes.jsonl"):
            (part / name).touch()
    return {"uri": plain}
