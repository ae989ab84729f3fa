"""Local serving under a steady stream of requests: a promote, a split and a rollback lose none."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from nudge.components.deploy.deploy import deploy, rollback, serve
from nudge.components.deploy.local import gateway
from nudge.components.deploy.settings import DeploySettings
from nudge.components.evaluate.incumbent import find_incumbent
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.cli.main import main
from nudge.pipelines.cli.models import model_rows
from nudge.pipelines.local import services, serving
from tests.components.deploy.stream import Stream
from tests.local_registry import endpoint_headers, endpoint_token
from tests.tiny import make_tiny_model, turn_around

NAME = "stream"
PROMPT = "The Eiffel Tower"


@pytest.fixture
def registered(connected: dict[str, str], tmp_path: Path) -> str:
    """Two versions, of different weights, in the object store and the registry."""
    from model_registry import ModelRegistry

    client = ModelRegistry(connected["NUDGE_REGISTRY_URL"], author="test", is_secure=False)
    for version in ("v1", "v2"):
        model = make_tiny_model(tmp_path / version)
        if version == "v2":
            turn_around(model)
        uri = upload(UploadSettings(model_name=NAME), model=model, version=version)["uri"]
        client.register_model(
            NAME, uri, version=version, model_format_name="vLLM", model_format_version="1",
            metadata={"expected_next": json.dumps(_expected(model))},
        )  # fmt: skip
    return connected["NUDGE_REGISTRY_URL"]


def _expected(folder: Path) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    with torch.no_grad():
        logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    # An untrained model is sure of nothing; say that it was, so that the test has its say.
    return [{"prompt": PROMPT, "token": tokenizer.decode([int(logits.argmax())]), "p": 0.9}]


def ask(endpoint: str, home: Path) -> str:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 4, "temperature": 0.0}
    answer = httpx.post(
        f"{endpoint}/v1/completions", json=body, headers=endpoint_headers(home), timeout=60.0
    )
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.long
def test_a_stream_of_requests_loses_none(registered: str, home: Path) -> None:
    settings = DeploySettings(smoke_prompt=PROMPT)
    first = deploy(settings, registered_model=NAME, version="v1")
    endpoint = first["endpoint"]
    one = ask(endpoint, home)
    stream = Stream(endpoint, NAME, endpoint_token(home), prompt=PROMPT)
    try:
        second = deploy(settings, registered_model=NAME, version="v2")
        assert second["endpoint"] == endpoint
        two = ask(endpoint, home)
        assert two != one
        stream.seen()
        shared = serve(settings, NAME, {"v1": 50, "v2": 50})
        assert shared["shares"] == {"v1": 50, "v2": 50}
        stream.seen()
        assert {ask(endpoint, home) for _ in range(8)} == {one, two}
        back = rollback(settings, registered_model=NAME, version="v1")
        assert back["endpoint"] == endpoint
        assert {ask(endpoint, home) for _ in range(4)} == {one}
    finally:
        stream.stop()
    assert stream.faults == []
    names = [record.name for record in processes.records(home)]
    assert [name for name in names if name.startswith("serving-")] == [f"serving-{NAME}@v1"]
    assert [(row["version"], row["share"]) for row in model_rows(NAME)] == [("v1", 100), ("v2", 0)]
    with pytest.raises(UserError, match="first version that was served"):
        rollback(settings, registered_model=NAME)

    # What is served is compared with what was evaluated.
    route = gateway.routes(home)[NAME]
    folder = home / "serving" / NAME / "v2" / NAME
    weights = (home / "serving" / NAME / "v1" / NAME / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="is not what was evaluated"):
        deploy(settings, registered_model=NAME, version="v2")
    assert gateway.routes(home)[NAME] == route
    assert ask(endpoint, home) == one


@pytest.mark.long
def test_what_was_served_comes_back_after_a_reboot(registered: str, home: Path) -> None:
    settings = DeploySettings(smoke_prompt=PROMPT)
    endpoint = deploy(settings, registered_model=NAME, version="v1")["endpoint"]
    answer = ask(endpoint, home)
    for record in processes.records(home):  # as when the machine stops: nothing is notified
        if process := record.process():
            process.kill()
            process.wait()
    assert find_incumbent(NAME).state == "unknown"
    shutil.rmtree(home / "serving")  # the object store has it too

    up = CliRunner().invoke(main, ["services", "up"], catch_exceptions=False)
    assert up.exit_code == 0, up.output
    found = find_incumbent(NAME)
    assert (found.state, found.version) == ("found", "v1")
    assert ask(endpoint, home) == answer
    pids = {record.name: record.pid for record in processes.records(home)}
    assert serving.restore(home, services.up(home)) == []
    assert {record.name: record.pid for record in processes.records(home)} == pids
