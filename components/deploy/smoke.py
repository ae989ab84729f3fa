"""The smoke test: does a served version answer, and as the evaluated model did?"""

import json
from typing import Any

from nudge.components.common.errors import UserError
from nudge.components.common.releases import Version
from nudge.components.deploy.settings import DeploySettings

SURE = 0.5
"""A next token that the evaluation found likelier than this must be the one served."""
TIMEOUT_S = 120.0


def smoke_test(address: str, version: Version, settings: DeploySettings) -> str:
    """Ask the server for completions; returns the answer to the smoke prompt.

    The probes' likeliest next tokens, which registration wrote down, must come back wherever the
    evaluation was sure of them: a served model that is not the evaluated one is found out. Raises
    `UserError` that says what was asked and what came.
    """
    name, prompt = version.model, settings.smoke_prompt
    answer = _complete(address, name, prompt, settings.smoke_tokens)
    if not answer.strip():
        raise UserError(f"the smoke test of {name} failed: an empty answer to {prompt!r}")
    for expected in json.loads(str(version.properties.get("expected_next", "[]"))):
        if expected["p"] <= SURE:
            continue
        got = _complete(address, name, expected["prompt"], 1)
        if got.strip() != expected["token"].strip():
            raise UserError(
                f"the smoke test of {name} {version.name} failed: after {expected['prompt']!r} the "
                f"evaluated model says {expected['token']!r} (P {expected['p']:.2f}), the served "
                f"one {got!r}; what is served is not what was evaluated"
            )
    return answer


def _complete(address: str, model: str, prompt: str, tokens: int) -> str:
    import httpx

    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
    }
    try:
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=TIMEOUT_S)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"the smoke test of {model} at {address} failed: {error}") from None
