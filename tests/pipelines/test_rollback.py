"""The pipeline `rollback`: after a promote, the endpoint answers with the old version again."""

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from kfp import components, local

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import find_served
from nudge.components.common.clients.storage import s3_client
from nudge.components.common.local import processes
from nudge.components.deploy.deploy import deploy
from nudge.components.deploy.settings import DeploySettings
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines import compile as compiling
from nudge.pipelines.local.runner import for_local_engine
from tests.local_registry import endpoint_headers
from tests.tiny import make_tiny_model, turn_around

NAME, PROMPT = "back", "The Eiffel Tower"
RECIPE = f"deploy: {{smoke_prompt: {PROMPT}}}"


@pytest.fixture
def registry(connected: dict[str, str], tmp_path: Path) -> str:
    """Two versions of different weights, uploaded and registered."""
    from model_registry import ModelRegistry

    address = connected["NUDGE_REGISTRY_URL"]
    client = ModelRegistry(address, author="test", is_secure=False)
    for version in ("v1", "v2"):
        model = make_tiny_model(tmp_path / version)
        if version == "v2":
            turn_around(model)
        uri = upload(UploadSettings(model_name=NAME), model=model, version=version)["uri"]
        key = f"models/{NAME}/{version}/manifest.json"
        manifest = s3_client().get_object(Bucket=connected["AWS_S3_BUCKET"], Key=key)["Body"].read()
        client.register_model(
            NAME, uri, version=version, model_format_name="vLLM", model_format_version="1",
            metadata={"manifest_sha256": hashlib.sha256(manifest).hexdigest()},
        )  # fmt: skip
    return address


def ask(endpoint: str, home: Path) -> str:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0.0}
    answer = httpx.post(
        f"{endpoint}/v1/completions", json=body, headers=endpoint_headers(home), timeout=60.0
    )
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.long
def test_the_old_version_answers_again(registry: str, home: Path, tmp_path: Path) -> None:
    settings = DeploySettings(smoke_prompt=PROMPT)
    endpoint = deploy(settings, registered_model=NAME, version="v1")["endpoint"]
    old = ask(endpoint, home)
    assert deploy(settings, registered_model=NAME, version="v2")["endpoint"] == endpoint
    assert ask(endpoint, home) != old
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(tmp_path / "artifacts"),
        raise_on_error=True,
    )
    compiled: Any = components.load_component_from_file(str(compiling.COMPILED / "rollback.yaml"))
    arguments = {"model_name": NAME, "recipe": RECIPE}
    pipeline = for_local_engine(compiled, arguments)
    pipeline(**arguments)
    assert ask(endpoint, home) == old
    served = with_registry(registry, find_served(NAME))
    assert served is not None
    assert (served.main, served.endpoint) == ("v1", endpoint)
    names = [record.name for record in processes.records(home)]
    assert [name for name in names if name.startswith("serving-")] == [f"serving-{NAME}@v1"]
    with pytest.raises(RuntimeError):  # nothing was served before it
        pipeline(**arguments)
    assert ask(endpoint, home) == old
