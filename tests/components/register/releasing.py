"""Upload and register in a process that can be killed: model, evaluation, name, version."""

import sys
from pathlib import Path

from nudge.components.register.register import register
from nudge.components.register.settings import RegisterSettings
from nudge.components.upload import sending
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload

model, evaluation, name, version = sys.argv[1:]
sending.PART_BYTES = 5 << 20
uri = upload(UploadSettings(model_name=name), model=Path(model), version=version)["uri"]
register(
    RegisterSettings(model_name=name),
    uri=uri,
    version=version,
    run_id=version,
    model=Path(model),
    evaluation=Path(evaluation),
)
