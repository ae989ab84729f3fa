"""The smoke test against `transformers serve`, of a base with a generation configuration."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import (
    likeliest,
    load_model,
    load_tokenizer,
    probabilities_along,
)
from nudge.components.deploy.measure import Probe
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import (
    FALLBACK_PROMPT,
    ModelServer,
    smoke_prompt,
    smoke_test,
)
from tests.model_server import running_model_server
from tests.tiny import make_tiny_model
from tests.web_server import Server

NAME = "tower"
PROMPT = "The Eiffel Tower is located in Paris"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own configuration penalizes the tokens of the prompt."""
    folder = make_tiny_model(tmp_path_factory.mktemp("served") / NAME)
    path = folder / "generation_config.json"
    values = {"repetition_penalty": 5.0, "num_beams": 3, "num_return_sequences": 2}
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ModelServer]:
    with running_model_server(folder.parent, folder.name) as server:
        yield server


def version(token: str) -> Version:
    expected = json.dumps([{"prompt": PROMPT, "token": token, "p": 0.9}])
    return Version(NAME, "1", "1", "1", "file:///", False, 0, {"expected_next": expected})


def test_without_a_recipe_a_version_is_asked_what_it_was_evaluated_with() -> None:
    """A model of codes or of JSON may have nothing to say to the default prompt."""
    evaluated, bare = version(" Paris"), replace(version(" Paris"), properties={})
    assert smoke_prompt(DeploySettings(), evaluated) == PROMPT
    assert smoke_prompt(DeploySettings(), bare) == FALLBACK_PROMPT
    assert smoke_prompt(DeploySettings(smoke_prompt="x"), evaluated) == "x"


def test_a_token_that_ends_inside_a_character_is_compared_by_its_probability() -> None:
    """vLLM 0.32 names such a token of a chat with an empty text; the evaluation writes U+FFFD."""
    top = [
        {"token": name, "logprob": math.log(p)} for name, p in (("", 0.6), ("S", 0.2), ("", 0.1))
    ]

    async def answer(_: web.Request) -> web.Response:
        first = {**top[0], "top_logprobs": top}
        choice = {"message": {"content": "日"}, "logprobs": {"content": [first]}}
        return web.json_response({"choices": [choice]})

    turns = [{"role": "user", "content": "Where?"}]
    with Server(("POST", "/v1/chat/completions", answer)) as server:
        for p, token in ((0.6, "\ufffd"), (0.6, " \ufffd"), (0.3, "\ufffd"), (0.6, "S")):
            expected = [{"prompt": "Where?", "messages": turns, "token": token, "p": p}]
            values = {"chat": True, "expected_next": json.dumps(expected)}
            served = Version(NAME, "1", "1", "1", "file:///", False, 0, values)
            probe = Probe(ModelServer(server.url), served, {"Where?": turns}, 1)
            with probe.server.client(timeout_s=5.0) as client:
                probe._ask(client, "Where?")
            assert (probe.measured().answers, probe.measured().right) == (int(token == "S"), 0)
            if (p, token) in ((0.3, "\ufffd"), (0.6, "S")):
                with pytest.raises(UserError, match="the served model is not the evaluated one"):
                    smoke_test(ModelServer(server.url), served, DeploySettings())
            else:
                assert smoke_test(ModelServer(server.url), served, DeploySettings()).text == "日"


@pytest.mark.long
def test_the_bases_penalty_does_not_fail_a_sound_model(folder: Path, server: ModelServer) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer(PROMPT)["input_ids"]
    token = likeliest(probabilities_along(model, ids, [])[0], tokenizer)[0]["token"]
    settings = DeploySettings(smoke_prompt=PROMPT)
    assert smoke_test(server, version(token), settings)

    # A user's request still has the base's configuration, which answers otherwise.
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 1, "temperature": 0.0}
    with server.client() as client:
        served = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert served.strip() != token.strip()
    with pytest.raises(UserError, match="the served model is not the evaluated one"):
        smoke_test(server, version(served), settings)
